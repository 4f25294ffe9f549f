"""What `test_traces` starts and kills, apart from it so that a process starts at once."""

from pathlib import Path

from mmr5_lab.account import Account
from mmr5_lab.chat import Chat
from mmr5_lab.corpus import Corpus, load_corpus
from mmr5_lab.retrieve import retrieve
from mmr5_lab.teachers import ServerTeacher
from mmr5_lab.traces import make_traces, training_candidates

CONCURRENCY = 4


def by_server(corpus: Corpus, url: str, folder: Path, **prices) -> ServerTeacher:
    chat = Chat(url, "m", concurrency=CONCURRENCY, retries=4, pause=0.01)
    return ServerTeacher(corpus, chat, Account(folder / "answers.sqlite", **prices))


def make_by_server(corpus_folder: Path, url: str, path: Path) -> None:
    corpus = load_corpus(corpus_folder)
    candidates = training_candidates(corpus, retrieve(corpus, top_k=5), 5, shuffles=4)
    make_traces(corpus, candidates, by_server(corpus, url, path.parent), path)
