"""Claims about what may be asked for: one spelling, and one message for all that is no perturbation."""

from __future__ import annotations

import pytest

from biojepa.errors import InputError
from biojepa.prediction_requests import ALL, parse_requests, read_requests, request_file


def test_requests_are_sorted_within_and_kept_in_order_each_once():
    entries = ["KLF1", " GATA1 + CEBPA", "CEBPA+GATA1", "HLA-DRA", "KLF1"]
    assert parse_requests(entries, "here") == ["KLF1", "CEBPA+GATA1", "HLA-DRA"]


def test_every_malformed_entry_is_named_in_one_message():
    entries = ["A++B", "KLF1", "", "A,B", "C D", "E+E", "control", "F+ctrl", "G+"]
    with pytest.raises(InputError) as caught:
        parse_requests(entries, "genes.txt")
    assert str(caught.value) == (
        "genes.txt: found 'A++B' lacks a gene; '' lacks a gene; "
        "'A,B' holds a blank, comma, semicolon or bar; 'C D' holds a blank, comma, semicolon or bar; "
        "'E+E' names a gene twice; 'control' names a control; "
        "'F+ctrl' names a control; 'G+' lacks a gene; expected one perturbation per entry: GENE, or genes "
        "joined by '+'. Fix: correct or remove these entries"
    )


def test_a_file_may_hold_comments_and_empty_lines(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("# of interest\nKLF1\n\n  B+A  # a pair\r\n", encoding="utf-8")
    assert read_requests(str(path)) == ["KLF1", "A+B"]
    assert request_file(str(path)) == str(path)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"genes\.txt: found no perturbation"):
        read_requests(str(path))


def test_all_is_a_word_of_its_own_and_no_gene():
    for entries in (["all"], ["KLF1", "all"], ["all+KLF1"]):
        with pytest.raises(InputError, match=r"'all.*' is no gene .*write predict: all\)"):
            read_requests(entries)
    assert parse_requests(["ALL1", "SMALL"], "here") == ["ALL1", "SMALL"]


def test_a_byte_order_mark_is_no_part_of_a_gene_and_another_encoding_is_refused(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("KLF1\n", encoding="utf-8-sig")
    assert read_requests(str(path)) == ["KLF1"]
    path.write_text("KLF1\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"genes\.txt: found text in another encoding.*save .* as UTF-8"):
        read_requests(str(path))


def test_all_and_nothing_name_no_file():
    assert read_requests("all") == ALL and read_requests(None) == [] and read_requests(["A"]) == ["A"]
    assert [request_file(value) for value in ("all", None, ["A"])] == [None, None, None]
