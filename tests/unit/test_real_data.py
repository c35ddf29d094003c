"""Tests of published screens are skipped without them, unless somebody says that they are there."""

import pytest

from workflow_case import missing_data


def test_missing_screens_are_a_skip_or_a_failure(monkeypatch):
    monkeypatch.delenv("BIOJEPA_REQUIRE_DATA", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no screens here"):
        missing_data("no screens here")
    monkeypatch.setenv("BIOJEPA_REQUIRE_DATA", "1")
    with pytest.raises(pytest.fail.Exception, match="BIOJEPA_REQUIRE_DATA is set, but no screens here"):
        missing_data("no screens here")
