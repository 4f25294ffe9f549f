"""`mmr5 parity` through servers with the same model, with another pixel limit, and with less to tell."""

from pathlib import Path

import pytest
from helpers.servers import ModelServer

from mmr5_lab.cli import main
from mmr5_lab.reranking.local import Reranker

BASE = str(Path(__file__).parents[2] / "data" / "mini" / "base")


@pytest.fixture
def compared(monkeypatch, capsys):
    monkeypatch.chdir(Path(BASE).parents[2])

    def compare(**server) -> tuple[int, dict[str, str], str]:
        model = Reranker.from_pretrained(BASE, max_pixels=server.pop("max_pixels", None))
        with ModelServer(model, **server) as served:
            code = main(["parity", BASE, "--server", served.url, "--questions=2", "--max-new-tokens=60"])
        printed = capsys.readouterr()
        return code, dict(line.split(": ", 1) for line in printed.out.splitlines()), printed.err

    return compare


def test_a_server_with_the_same_model_is_alike_in_every_mode(compared):
    code, lines, _ = compared()
    assert code == 0
    assert lines["prompts"] == "2 of 2 have as many tokens"
    assert lines["reason"] == lines["direct"] == "2 of 2 orders alike, 2 texts alike"
    assert lines["score"].startswith("2 of 2 orders alike, scores at most ")
    assert lines["2 questions"] == "the server ranks as the model does here"


def test_a_server_that_shows_smaller_pages_parts_and_the_first_difference_is_said(compared):
    """A page of 140 × 168 pixels has 30 visual tokens, one of 84 × 84 has 9."""
    code, lines, errors = compared(max_pixels=84 * 112)
    assert code == 1
    here, there = 30 * 5, 9 * 5
    assert (
        f"0 of 2 have as many tokens; pair 0: {(whole := _number(lines['prompts']))} here, {here} of"
        in lines["prompts"]
    )
    assert lines["prompts"].endswith(f"pages, {whole - here + there} there")
    assert " parts at token " in lines["reason"]
    assert "the server parts from the model in: token counts, reason, " in errors


def test_modes_that_a_server_cannot_do_are_named_and_left_out(compared):
    code, lines, _ = compared(lacks=["logprobs"])
    assert code == 0
    assert lines["reason"] == "2 of 2 orders alike, 2 texts alike"
    for mode in ("direct", "score", "pointwise"):
        assert lines[mode].startswith("not compared: ")
        assert "it gives no log-probabilities" in lines[mode]


def _number(line: str) -> int:
    return int(line.split("pair 0: ")[1].split()[0])
