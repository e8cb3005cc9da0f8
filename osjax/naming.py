"""Names of output files: pure arithmetic on strings, no file is touched."""

from __future__ import annotations

from osjax.errors import OsjaxError

_MAX_BYTES = 240  # file systems allow 255; the rest is for the extension and a temporary file's suffix


def output_stem(
    name: str | None = None,
    *,
    fallback: str = "prompt",
    index: int = 0,
    sample: int = 0,
    prefix: str = "",
    prompt: str | None = None,
) -> str:
    """The file name of one output, without folder and extension.

    With a name (the CSV's `name` column) "<prefix><name>", else "<prefix><fallback>_<index, 4 digits>"; samples after
    the first of the same prompt add "_<sample>". A prompt, if given, is the name instead: "<prompt>-<sample>", its
    outer full stops removed (the convention of VBench) and slashes turned to underscores.

    Raises OsjaxError for a name that is no plain file name.
    """
    if prompt is not None:
        stem = f"{prompt.strip('.').replace('/', '_')}-{sample}"
    else:
        stem = prefix + name if name is not None else f"{prefix}{fallback}_{index:04d}"
        if sample > 0:
            stem += f"_{sample}"
    if stem in ("", ".", "..") or "/" in stem or "\0" in stem:
        raise OsjaxError(f"{stem!r} cannot name a file: give a plain name without slashes")
    if len(stem.encode()) > _MAX_BYTES:
        raise OsjaxError(f"the file name {stem[:40]!r}… is over {_MAX_BYTES} bytes long: give a shorter one")
    return stem
