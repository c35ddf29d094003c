"""A job's log holds what it said; its user gets one message."""

import logging
import warnings

import pytest

from biojepa.collapse import CollapseError
from biojepa.errors import InputError
from biojepa.logs import log_to
from biojepa.splits import LeakageError

ERROR = InputError("data/x.h5ad, column gene", "no such column", "a column gene", "name it in the table")


def test_an_input_error_is_one_message_on_the_terminal_and_leaves_with_status_1(tmp_path, capsys):
    log = tmp_path / "logs" / "job.log"
    with pytest.raises(SystemExit) as caught, log_to(log):
        raise ERROR
    assert caught.value.code == 1
    said = capsys.readouterr().err
    message = (
        "biojepa: data/x.h5ad, column gene: found no such column; expected a column gene. "
        "Fix: name it in the table"
    )
    assert said.strip().splitlines() == [message, f"(log: {log})"]
    assert "Traceback" not in log.read_text(encoding="utf-8")
    assert "found no such column" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [CollapseError, LeakageError])
def test_a_run_that_stops_itself_is_one_message_and_leaves_with_status_1(tmp_path, capsys, kind):
    log = tmp_path / "job.log"
    with pytest.raises(SystemExit) as caught, log_to(log):
        raise kind("The spread fell. Raise the weight.")
    assert caught.value.code == 1
    assert capsys.readouterr().err.strip().splitlines() == [
        "biojepa: The spread fell. Raise the weight.",
        f"(log: {log})",
    ]
    text = log.read_text(encoding="utf-8")
    assert "The spread fell" in text and "Traceback" not in text


def test_a_defect_keeps_its_traceback_in_the_log_and_still_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), log_to(tmp_path / "job.log"):
        _ = 1 / 0
    text = (tmp_path / "job.log").read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "ZeroDivisionError" in text


def test_messages_and_warnings_go_to_the_log_of_their_own_job(tmp_path):
    for name in ("first", "second"):
        with log_to(tmp_path / f"{name}.log"):
            logging.getLogger("biojepa.x").info("from %s", name)
            warnings.warn(f"beware of {name}", stacklevel=1)
    text = (tmp_path / "first.log").read_text(encoding="utf-8")
    assert "INFO biojepa.x: from first" in text
    assert "beware of first" in text
    assert "second" not in text


def test_logging_is_left_as_it_was_found(tmp_path):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    with log_to(tmp_path / "job.log"):
        assert root.level == logging.INFO
    assert (root.level, list(root.handlers)) == before


def test_a_second_run_replaces_the_log(tmp_path):
    for word in ("once", "twice"):
        with log_to(tmp_path / "job.log"):
            logging.getLogger("biojepa").info(word)
    assert "once" not in (tmp_path / "job.log").read_text(encoding="utf-8")


def test_an_input_error_survives_a_process_boundary():
    kind, parts = ERROR.__reduce__()
    assert str(kind(*parts)) == str(ERROR)
    assert (kind(*parts).where, kind(*parts).fix) == (ERROR.where, ERROR.fix)


def test_a_warning_of_the_library_is_seen_on_the_terminal_too(tmp_path, capsys):
    log = tmp_path / "job.log"
    with log_to(log):
        logging.getLogger("biojepa.training").info("a detail")
        logging.getLogger("biojepa.training").warning("the GPU is not used")
        logging.getLogger("other").warning("of another library")
    assert capsys.readouterr().err == "biojepa: the GPU is not used\n"
    assert "the GPU is not used" in log.read_text(encoding="utf-8")
    logging.getLogger("biojepa.training").warning("after the job")
    assert "biojepa: after" not in capsys.readouterr().err
