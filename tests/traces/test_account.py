"""Answers are kept and paid for once; the budget holds over threads and restarts."""

import threading

import pytest

from mmr5_lab.traces.account import Account, BudgetError


def test_an_answer_is_found_again_and_costs_what_the_server_counted(tmp_path):
    account = Account(tmp_path / "a.sqlite", price_in=2.0, price_out=10.0)
    assert account.find("k") is None
    number = account.open_try("k", "m", 1_000_000, 100_000)
    assert account.spent == pytest.approx(3.0), "at most"
    account.close_try(number, 500_000, 10_000, "because")
    assert account.spent == pytest.approx(1.1)
    account.close()
    again = Account(tmp_path / "a.sqlite", price_in=2.0, price_out=10.0)
    assert again.find("k") == "because"
    assert again.spent == pytest.approx(1.1)
    assert again.summary().loc["m"].tolist() == [1, 0, 500_000, 10_000, pytest.approx(1.1)]


def test_a_refused_try_costs_nothing_and_one_cut_off_stays_at_its_most(tmp_path):
    account = Account(tmp_path / "a.sqlite", price_in=1.0)
    account.close_try(account.open_try("k", "m", 1000, 0), 0, 0)
    account.open_try("k", "m", 1000, 0)
    assert account.spent == pytest.approx(0.001)
    assert account.summary().loc["m", "tries without"] == 2
    assert account.find("k") is None


def test_the_budget_is_never_passed_by_threads_or_a_second_process_s_account(tmp_path):
    """A call may cost 1, the budget is 10.5: ten fit, whoever asks."""
    accounts = [Account(tmp_path / "a.sqlite", price_in=1.0, budget=10.5) for _ in range(2)]
    refused = []

    def ask(account):
        for k in range(4):
            try:
                account.open_try(str(k), "m", 1_000_000, 0)
            except BudgetError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=ask, args=(accounts[k % 2],)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accounts[0].spent == pytest.approx(10.0)
    assert len(refused) == 8 * 4 - 10
    assert "the budget of 10.5 would be passed: 10 is spent or under way" in refused[0]
    accounts[1].close_try(1, 100_000, 0, "cheaper")
    accounts[0].open_try("k", "m", 1_000_000, 0)  # what was not used up is there again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.0}, "needs prices"),
        ({"price_in": -1.0}, "negative"),
        ({"budget": -1.0, "price_in": 1.0}, "negative"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Account(tmp_path / "a.sqlite", **options)


def test_another_file_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes, which are longer than a database's header of a hundred bytes" * 3)
    with pytest.raises(ValueError, match="is not a file of answers"):
        Account(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text().startswith("my notes")
