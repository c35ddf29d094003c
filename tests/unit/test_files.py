"""Files are whole or absent, and equal content gives equal bytes."""

import hashlib
import json
import os

import numpy as np
import pandas as pd
import pytest

from biojepa.files import atomic_path, read_tsv, sha256_of, write_json, write_text, write_tsv


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError, match="disk full"), atomic_path(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == "old"


def test_a_reader_sees_no_file_until_the_block_ends(tmp_path):
    path = tmp_path / "new" / "cells.h5ad"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"content")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename is atomic within one folder only"
        assert temporary.suffix == ".h5ad"
        assert temporary.name.startswith(".")
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_a_table_reads_back_the_same_even_with_a_gene_called_na(tmp_path):
    table = pd.DataFrame(
        {"gene": ["NA", "nan", "STAT1"], "value": [1 / 3, np.nan, 1e-300], "note": ["", "x y", "null"]}
    )
    write_tsv(table, tmp_path / "t.tsv")
    read = read_tsv(tmp_path / "t.tsv")
    assert read["gene"].tolist() == ["NA", "nan", "STAT1"]
    np.testing.assert_allclose(read["value"], table["value"], rtol=1e-9)
    assert read["note"].fillna("").tolist() == ["", "x y", "null"]


def test_tables_are_written_with_ten_digits_and_unix_lines(tmp_path):
    write_tsv(pd.DataFrame({"x": [1 / 3, 2.0], "n": [1, 2]}), tmp_path / "t.tsv")
    assert (tmp_path / "t.tsv").read_bytes() == b"x\tn\n0.3333333333\t1\n2\t2\n"


def test_equal_content_gives_equal_json(tmp_path):
    write_json({"b": 1, "a": [1, "é"]}, tmp_path / "one.json")
    write_json({"a": [1, "é"], "b": 1}, tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text(encoding="utf-8")) == {"a": [1, "é"], "b": 1}


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_digest_of_a_file_larger_than_a_block(tmp_path, algorithm):
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "f").write_bytes(content)
    assert sha256_of(tmp_path / "f", algorithm) == hashlib.new(algorithm, content).hexdigest()


def test_text_is_utf8(tmp_path):
    write_text("Δ ≥ 0\n", tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_bytes() == "Δ ≥ 0\n".encode()
