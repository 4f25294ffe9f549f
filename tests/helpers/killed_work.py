"""What `test_traces` starts and kills, apart from it so that a process starts at once."""

from pathlib import Path

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.models.chat import Chat
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.account import Account
from mmr5_lab.traces.construction import make_traces, training_candidates
from mmr5_lab.traces.teachers import ServerTeacher

CONCURRENCY = 4


def by_server(corpus: Corpus, url: str, folder: Path, concurrency: int = CONCURRENCY, **prices) -> ServerTeacher:
    chat = Chat(url, "m", concurrency=concurrency, retries=4, pause=0.01)
    return ServerTeacher(corpus, chat, Account(folder / "answers.sqlite", **prices))


def make_by_server(corpus_folder: Path, url: str, path: Path) -> None:
    corpus = load_corpus(corpus_folder)
    candidates = training_candidates(corpus, retrieve(corpus, top_k=5), 5, shuffles=4)
    make_traces(corpus, candidates, by_server(corpus, url, path.parent), path)
