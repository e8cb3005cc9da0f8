"""The named configurations of training: they load, and say what they are for."""

import ast
from pathlib import Path

import pytest

import configs.train
from osjax.cli import train_options

FOLDER = Path(configs.train.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_path_give_one_run(name):
    by_path = train_options.read([str(FOLDER / f"{name}.py")])
    assert train_options.read([name]) == by_path
    assert by_path.folder == Path("runs") / name


def test_a_configuration_states_source_result_and_command():
    for name in set(NAMES) - {"base"}:
        docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
        assert "Source: " in docstring, name
        assert "Expected result: " in docstring, name
        assert f"osjax train {name} " in f"{docstring} ", name
