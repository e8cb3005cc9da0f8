"""Every case found is of a kind that is tested, or stands in the one list of kinds that later work covers."""

import pytest

from tests.parity import cases


@pytest.mark.parametrize("case", cases.discover(), ids=cases.case_id)
def test_kind_is_known(case):
    assert case.kind in cases.COVERED | cases.EXPECTED_MISSING, (
        f"{case.name} is of kind {case.kind!r}, which no parity test covers: add a test, do not skip it"
    )


def test_no_kind_is_both():
    assert not cases.COVERED & cases.EXPECTED_MISSING
