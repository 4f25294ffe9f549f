"""Teachers: a server over a real socket, and the two offline ones."""

import base64
import io
import threading

import pytest
from helpers.servers import Server, completion, failure
from PIL import Image

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.mini.teacher import EvidenceTeacher, evidence_teacher
from mmr5_lab.models.chat import Chat
from mmr5_lab.prompting.prompts import TEACHER_REFINE_TEMPLATE, teacher_prompt
from mmr5_lab.traces.account import Account, BudgetError
from mmr5_lab.traces.teachers import QuoteTeacher, ServerTeacher, TeacherError, TeacherGoneError, think_lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=5, splits={"sft": (2, 5)})


@pytest.fixture(scope="module")
def written(tmp_path_factory, corpus) -> Corpus:
    """Pages with text and no annotated content; one with words that look like markup, one without words."""
    folder = tmp_path_factory.mktemp("written")
    texts = ['Income grew.\nRevenue in 2015 was 4.2 million "euro", up.', "The staff of 2015 is listed.", ""]
    question = {"Q": "What was the revenue in 2015?", "A": "4.2 million", "page_id": [0], "type": "['Pure-text']"}
    image = corpus.page_bytes("sft-000", 0)
    write_corpus(
        folder,
        [{"doc_name": "report.pdf", "domain": "PDF", "questions": [question]}],
        [{"doc_name": "report.pdf", "image_binary": image, "ocr_text": text} for text in texts],
    )
    return load_corpus(folder)


def server_teacher(corpus, server, tmp_path, retries=2, **account) -> ServerTeacher:
    chat = Chat(server.url, "m", retries=retries, pause=0.01, concurrency=4)
    return ServerTeacher(corpus, chat, Account(tmp_path / "answers.sqlite", **account))


def test_a_page_is_shown_with_its_label_and_asked_for_once(corpus, tmp_path):
    question = corpus.questions.iloc[0]
    with Server({}, answer=lambda text: "<think>hm</think> Because.\n") as server:
        teacher = server_teacher(corpus, server, tmp_path)
        assert [teacher.explain(question, 2, True) for _ in range(2)] == ["Because."] * 2
        again = server_teacher(corpus, server, tmp_path)
        assert again.explain(question, 2, True) == "Because.", "found by another process too"
        assert len(server.bodies) == 1
        again.explain(question, 2, False)
        again.explain(question, 1, True)
        assert len(server.bodies) == 3, "another label or page is another question"
    [message] = server.bodies[0]["messages"]
    assert message["content"][0]["text"] == teacher_prompt(question["question"], True)
    assert message["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (server.bodies[0]["model"], teacher.name) == ("m", "m")


def test_threads_that_ask_the_same_share_one_call(corpus, tmp_path):
    question = corpus.questions.iloc[0]
    with Server({}, delay=0.2, answer=lambda text: "Because.") as server:
        teacher = server_teacher(corpus, server, tmp_path)
        said = []
        threads = [threading.Thread(target=lambda: said.append(teacher.explain(question, 0, True))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert said == ["Because."] * 6
    assert len(server.bodies) == 1


def test_refining_sums_up_the_explanations_of_the_pages(corpus, tmp_path):
    question = corpus.questions.iloc[0]
    with Server({}, answer=lambda text: "Short." if "summarize" in text else "On\n\npaper.") as server:
        teacher = server_teacher(corpus, server, tmp_path)
        assert teacher.refine(question, [3, 1], [2]) == "Short."
    lines = "Image 1: On paper.\nImage 2: On paper."
    asked = TEACHER_REFINE_TEMPLATE.format(question=question["question"], positive_image="Image 2", think=lines)
    assert server.bodies[-1]["messages"][0]["content"] == [{"type": "text", "text": asked}]
    assert [len(body["messages"][0]["content"]) for body in server.bodies] == [2, 2, 1]


def explain(teacher, corpus, k: int, page: int = 0) -> str:
    return teacher.explain(corpus.questions.iloc[k], page, True)


def test_faults_of_the_server_have_their_kind_and_their_price(corpus, tmp_path):
    questions = [corpus.questions.iloc[k]["question"] for k in range(4)]
    turns = {questions[0]: [400], questions[1]: [500] * 3, questions[2]: [b"odd", 503], questions[3]: [401]}
    with Server(turns, answer=lambda text: "Because.") as server:
        teacher = server_teacher(corpus, server, tmp_path, price_in=1.0)
        with pytest.raises(TeacherError, match="BadRequestError 400"):
            explain(teacher, corpus, 0)
        with pytest.raises(TeacherError, match="InternalServerError 500"):
            explain(teacher, corpus, 1)
        assert teacher.account.spent == 0, "refusals cost nothing"
        assert [explain(teacher, corpus, 2) for _ in range(2)] == ["Because."] * 2
        with pytest.raises(TeacherGoneError, match="AuthenticationError 401"):
            explain(teacher, corpus, 3)
        with pytest.raises(TeacherGoneError, match="AuthenticationError 401"):
            explain(teacher, corpus, 0, page=1)
    assert len(server.bodies) == 1 + 3 + 3 + 1, "after the 401 nothing is sent"
    summary = teacher.account.summary().loc["m"]
    assert (summary["answers"], summary["tries without"]) == (1, 7)
    kinds = ["BadRequestError 400", "InternalServerError 500", "InternalServerError 503", "AuthenticationError 401"]
    assert [summary[kind] for kind in [*kinds, "unreadable"]] == [1, 3, 1, 1, 1]
    assert 1e-6 * 1500 < summary["cost"] < 1e-6 * 2000, "an answer, and an odd one that may have been billed"


NO_ANSWERS = {
    "cut": completion("Half an ans", "length"),
    "refused": completion(None, refusal="I cannot help with this."),
    "filtered": completion("", "content_filter"),
    "empty": completion(None, reasoning="The page shows …"),
    "failed": completion("Half", "error"),
}


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_what_is_no_answer_is_paid_as_counted_and_asked_again_by_the_next_run_alone(kind, corpus, tmp_path):
    question = corpus.questions.iloc[0]["question"]
    with Server({question: [NO_ANSWERS[kind]]}, answer=lambda text: "Because.") as server:
        prices = {"price_in": 1e6, "price_out": 1e6}
        teacher = server_teacher(corpus, server, tmp_path, **prices)
        for _ in range(3):
            with pytest.raises(TeacherError, match=f"^{kind}: "):
                explain(teacher, corpus, 0)
        assert len(server.bodies) == 1, "also by other orders of the question's pages"
        assert teacher.account.spent == 1 + 9, "as the server counted"
        for _ in range(2):
            assert explain(server_teacher(corpus, server, tmp_path, **prices), corpus, 0) == "Because."
    assert len(server.bodies) == 2
    assert teacher.account.summary().loc["m"].to_dict() == {
        "answers": 1, "tries without": 1, kind: 1, "prompt tokens": 2, "completion tokens": 18, "cost": 20.0
    }  # fmt: skip


def test_an_error_in_a_200_costs_nothing_and_an_answer_without_a_count_what_it_may(corpus, tmp_path):
    question = corpus.questions.iloc[0]["question"]
    turns = {question: [failure("overloaded").encode(), completion("Because.", usage=None)]}
    with Server(turns) as server:
        teacher = server_teacher(corpus, server, tmp_path, price_in=1.0, price_out=1.0)
        with pytest.raises(TeacherError, match=r"^failed: the server reports an error \(overloaded\)"):
            explain(teacher, corpus, 0)
        assert teacher.account.spent == 0
        teacher = server_teacher(corpus, server, tmp_path, price_in=1.0, price_out=1.0)
        assert explain(teacher, corpus, 0) == "Because."
    assert teacher.account.spent * 1e6 > 1500 + 300


def test_pages_are_brought_into_a_pixel_budget_and_answers_depend_on_it(corpus, tmp_path):
    with Server({}, answer=lambda text: "Because.") as server:
        account = Account(tmp_path / "answers.sqlite")
        for max_pixels in (None, 8000, 8000):
            explain(ServerTeacher(corpus, Chat(server.url, "m"), account, max_pixels=max_pixels), corpus, 0)
        sent = [body["messages"][0]["content"][1]["image_url"]["url"].split(",")[1] for body in server.bodies]
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size for data in sent] == [(140, 168), (56, 84)]


def test_the_budget_ends_the_work_before_it_is_passed(corpus, tmp_path):
    """An answer is billed at 1 + 9 tokens, .001 at these prices; a call may cost much more, and so is not sent."""
    question = corpus.questions.iloc[0]
    with Server({}, answer=lambda text: "Because.") as server:
        teacher = server_teacher(corpus, server, tmp_path, price_in=100.0, price_out=100.0, budget=0.22)
        asked = [(page, label) for label in (True, False) for page in range(corpus.num_pages("sft-000"))]
        with pytest.raises(BudgetError, match=r"the budget of 0\.22 would be passed"):
            [teacher.explain(question, page, label) for page, label in asked]
        account = Account(tmp_path / "answers.sqlite")
    assert 0 < len(server.bodies) < len(asked)
    assert account.spent == pytest.approx(0.001 * len(server.bodies))
    bound = 100e-6 * (1500 + 50 + 300 + len(teacher_prompt(question["question"], True)))
    assert 0.22 - bound < account.spent <= 0.22


def test_a_page_that_counts_more_than_was_thought_raises_the_bound(corpus, tmp_path):
    dear = completion("Because.", usage={"prompt_tokens": 40_000, "completion_tokens": 9, "total_tokens": 40_009})
    question = corpus.questions.iloc[0]
    with Server({question["question"]: [dear]}, answer=lambda text: "Because.") as server:
        teacher = server_teacher(corpus, server, tmp_path, price_in=1.0, budget=0.06)
        teacher.explain(question, 0, True)
        with pytest.raises(BudgetError, match=r"the next may cost 0\.04"):
            teacher.explain(question, 1, True)


def test_keys_stand_in_no_file(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    question = corpus.questions.iloc[0]
    turns = {question["question"]: [(400, failure("wrong key secret-7"))]}
    with Server(turns, answer=lambda text: "Because.") as server:
        teacher = server_teacher(corpus, server, tmp_path)
        with pytest.raises(TeacherError) as error:
            teacher.explain(question, 0, True)
        server_teacher(corpus, server, tmp_path).explain(question, 0, True)
        teacher.account.close()
    assert set(server.keys) == {"Bearer secret-7"}
    assert "secret-7" not in str(error.value)
    assert all(b"secret-7" not in path.read_bytes() for path in tmp_path.iterdir())


def test_the_evidence_teacher_says_what_the_label_calls_for(corpus):
    question = corpus.questions.iloc[0]
    teacher = evidence_teacher(corpus)
    assert isinstance(teacher, EvidenceTeacher)
    gold = question["gold_pages"][0]
    assert teacher.explain(question, gold, True).endswith("It answers the question.")
    assert teacher.explain(question, gold, False).endswith("It does not help.")


def test_the_quoting_teacher_shows_the_words_that_match(written):
    question = written.questions.iloc[0]
    teacher = evidence_teacher(written)
    assert isinstance(teacher, QuoteTeacher)
    assert think_lines(teacher, question, [0, 1, 2], [1]).split("\n") == [
        "Image 1: The page says \"Income grew. Revenue in 2015 was 4.2 million 'euro', up.\", with revenue and"
        " 2015. It answers the question.",
        'Image 2: The nearest words, "The staff of 2015 is listed.", have 2015, without revenue. It does not help.',
        "Image 3: The page has no words on revenue and 2015. It does not help.",
    ]
    assert teacher.explain(question, 2, True) == "", "it has nothing to quote for a page without words"
    assert teacher.explain(question, 0, False).endswith(
        "have revenue and 2015, but not what is asked. It does not help."
    )
    assert teacher.refine(question, [1, 0], [2]).startswith('Image 2 says "Income grew.')
    assert teacher.refine(question, [2], [1]) == ""


def test_a_passage_of_a_long_page_stays_within_forty_words(tmp_path, corpus):
    text = "filler words here " * 200 + "the revenue of 2015 was 4.2 million " + "and more " * 200
    question = {
        "Q": "What was the revenue of the whole group of companies in 2015?",
        "A": "",
        "page_id": [0],
        "type": "",
    }
    record = {"doc_name": "a", "domain": "PDF", "questions": [question]}
    page = {"doc_name": "a", "image_binary": corpus.page_bytes("sft-000", 0), "ocr_text": text}
    write_corpus(tmp_path, [record], [page])
    long = load_corpus(tmp_path)
    for label in (True, False):
        said = QuoteTeacher(long).explain(long.questions.iloc[0], 0, label)
        assert "revenue of 2015" in said
        assert len(said.split()) <= 40
