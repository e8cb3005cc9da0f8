"""Reading checkpoints: every dtype as it is, every kind of damage as one line, and no code out of a pickle."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.sources import open_source
from osjax.errors import OsjaxError

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.asarray(7, np.int64),
    "c": np.arange(6, dtype=np.float16).reshape(2, 3),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def assert_holds(source, tensors):
    assert set(source.shapes) == set(tensors)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape) == (source.shapes[name].dtype, tensor.shape)
        assert read.tobytes() == tensor.tobytes()


def test_safetensors(file):
    source = open_source(file)
    assert source.files == (file,)
    assert_holds(source, TENSORS)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [("BF16", ml_dtypes.bfloat16), ("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)],
)
def test_short_floats(tmp_path, code, dtype):
    tensor = np.asarray([[0.5, -2.0], [1.5, 448.0]]).astype(dtype)
    header = {"x": {"dtype": code, "shape": [2, 2], "data_offsets": [0, tensor.nbytes]}}
    assert_holds(open_source(write_raw(tmp_path / "x.safetensors", header, tensor.tobytes())), {"x": tensor})


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_a_truncated_file(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OsjaxError, match=r"model\.safetensors is damaged \(.*\): download it again"):
        open_source(file)


def test_a_file_that_shrinks_while_it_is_read(file):
    source = open_source(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OsjaxError, match="became shorter"):
        source.read("a.weight")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"\xff\xfe",
        b"[" * 100_000,
        [1],
        {"x": 3},
        {"x": ENTRY | {"shape": [3]}},
        {"x": ENTRY | {"shape": [-2]}},
        {"x": ENTRY | {"shape": ["2"]}},
        {"x": ENTRY | {"data_offsets": [0]}},
        {"x": ENTRY, "y": ENTRY},
        {"x": ENTRY | {"data_offsets": [4, 12]}},
        {"x": {"dtype": "F32"}},
    ],
    ids=lambda header: str(header)[:30],
)
def test_a_garbled_header(tmp_path, header):
    with pytest.raises(OsjaxError, match="is damaged"):
        open_source(write_raw(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_dtype_nobody_supports(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {"x": ENTRY | {"dtype": "C64"}}, bytes(8))
    with pytest.raises(OsjaxError, match="C64, which is not supported"):
        open_source(path)


def test_absent_and_foreign_files(tmp_path):
    with pytest.raises(OsjaxError, match="is missing"):
        open_source(tmp_path / "absent.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(OsjaxError, match="is no checkpoint"):
        open_source(tmp_path / "notes.txt")


@pytest.fixture
def index(tmp_path):
    """Two shards and their index."""
    names = list(TENSORS)
    weight_map = {name: f"model-0000{position % 2}.safetensors" for position, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: TENSORS[name] for name in names if weight_map[name] == shard}, tmp_path / shard)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards(index):
    source = open_source(index)
    assert_holds(source, TENSORS)
    assert [path.name for path in source.files] == [index.name, "model-00000.safetensors", "model-00001.safetensors"]


def test_shards_of_which_one_is_missing(index):
    (index.parent / "model-00001.safetensors").unlink()
    with pytest.raises(OsjaxError, match=r"files that are missing \(model-00001\.safetensors\): download them"):
        open_source(index)


def test_shards_without_a_tensor_that_the_index_names(index):
    save_file({"b": TENSORS["b"]}, index.parent / "model-00001.safetensors")
    with pytest.raises(OsjaxError, match=r"tensors it names: empty of model-00001\.safetensors"):
        open_source(index)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../a.safetensors"}}'],
)
def test_a_garbled_index(index, text):
    index.write_text(text)
    with pytest.raises(OsjaxError, match="no usable weight_map"):
        open_source(index)


PICKLED = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T.copy(),
    "half": np.asarray([1.5, -2.0], ml_dtypes.bfloat16),
    "tiny": np.asarray([0.5, 448.0], ml_dtypes.float8_e4m3fn),
    "scalar": np.asarray(3, np.int64),
    "flag": np.asarray([True, False]),
}


class TestPickles:
    """PyTorch is an extra; where it is not installed its files cannot be made either."""

    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.fixture
    def state(self, torch):
        return {
            "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
            "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
            "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "tiny": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
            "scalar": torch.tensor(3),
            "flag": torch.tensor([True, False]),
        }

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_a_state_dict(self, torch, state, tmp_path, suffix, zipped):
        path = tmp_path / f"model{suffix}"
        names = [name for name in state if zipped or name != "tiny"]  # PyTorch's old format knows no fp8
        torch.save({name: state[name] for name in names}, path, _use_new_zipfile_serialization=zipped)
        assert_holds(open_source(path), {name: PICKLED[name] for name in names})

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"model": state},
            lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        ],
        ids=["state_dict", "model", "module."],
    )
    def test_wrappings_of_training_scripts(self, torch, state, tmp_path, wrap):
        torch.save(wrap(state), tmp_path / "model.pt")
        assert_holds(open_source(tmp_path / "model.pt"), PICKLED)

    def test_pages_are_given_back(self, torch, state, tmp_path, monkeypatch):
        """Remapping after every read changes nothing about what is read."""
        monkeypatch.setattr("convert.sources._REOPEN_AFTER", 0)
        torch.save(state, tmp_path / "model.pt")
        assert_holds(open_source(tmp_path / "model.pt"), PICKLED)

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_code_is_refused_and_never_run(self, torch, tmp_path, zipped):
        witness = tmp_path / "ran"
        torch.save({"w": Touch(str(witness))}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(OsjaxError, match="is refused"):
            open_source(tmp_path / "model.pt")
        assert not witness.exists()

    @pytest.mark.parametrize("keep", [0, 10, 300, -100])
    def test_truncated(self, torch, state, tmp_path, keep):
        path = tmp_path / "model.pt"
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(OsjaxError, match=r"model\.pt"):
            open_source(path)

    @pytest.mark.parametrize("content", [3, [], {}, {"a": "text"}], ids=str)
    def test_not_a_state_dict(self, torch, tmp_path, content):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(OsjaxError, match=r"save model\.state_dict\(\) alone"):
            open_source(tmp_path / "model.pt")

    def test_sparse_tensors(self, torch, tmp_path):
        torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "model.pt")
        with pytest.raises(OsjaxError, match="sparse tensors, which are not supported"):
            open_source(tmp_path / "model.pt")


class Touch:
    """Pickled, it creates a file when it is loaded the unsafe way."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
