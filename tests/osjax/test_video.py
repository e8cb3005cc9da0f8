"""Videos: what a notebook shows of them."""

import base64
import dataclasses
import re

import numpy as np
import pytest

from osjax.media import probe
from osjax.provenance import Provenance
from osjax.video import Video

PROVENANCE = Provenance(
    **{field.name: "" for field in dataclasses.fields(Provenance) if field.default is dataclasses.MISSING}
    | {"num_frames": 5, "fps": 24, "height": 32, "width": 48, "guidance": {}, "refs": (), "seconds": {}, "request": {}}
)


@pytest.mark.parametrize(("count", "tag", "kind"), [(5, "video", "video/mp4"), (1, "img", "image/png")])
def test_a_notebook_shows_the_file_itself(tmp_path, count, tag, kind):
    frames = np.zeros((count, 32, 48, 3), np.uint8)
    video = Video(frames, 24, dataclasses.replace(PROVENANCE, num_frames=count))
    shown = re.fullmatch(rf'<{tag} src="data:{kind};base64,([\w+/=]+)".*', video._repr_html_())
    path = tmp_path / f"shown.{kind[-3:]}"
    path.write_bytes(base64.b64decode(shown[1]))
    assert (probe(path).frames, probe(path).height, probe(path).width) == (count, 32, 48)
