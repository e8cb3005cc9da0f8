"""Every case found is of a kind that is tested."""

import pytest

from tests.parity import cases


@pytest.mark.parametrize("case", cases.discover(), ids=cases.case_id)
def test_kind_is_known(case):
    assert case.kind in cases.COVERED, (
        f"{case.name} is of kind {case.kind!r}, which no parity test covers: add a test, do not skip it"
    )
