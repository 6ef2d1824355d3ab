"""What a file that cannot be read seems to be instead, by its first bytes, and what to do with it."""

from __future__ import annotations

HEAD = 64  # bytes that ``looks_like`` wants to see

_NO_PICKLE = "manidp reads no pickle; its own models are .safetensors files"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; bring that with: git lfs pull"),
    (b"PK\x03\x04", f"a zip archive, such as torch.save writes (.pt, .pth); {_NO_PICKLE}"),
    (b"\x80\x02", f"a Python pickle, such as old versions of torch.save write (.pt, .pth); {_NO_PICKLE}"),
    (b"\x80\x03", f"a Python pickle; {_NO_PICKLE}"),
    (b"\x80\x04", f"a Python pickle; {_NO_PICKLE}"),
    (b"\x80\x05", f"a Python pickle; {_NO_PICKLE}"),
    (b"\x1f\x8b", "a gzip file; decompress it first"),
    (b"BZh", "a bzip2 file; decompress it first"),
    (b"\xfd7zXZ", "an xz file; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; decompress it first"),
    (b"\x93NUMPY", "a NumPy array (.npy), such as a gated network's thresholds: convert takes it with --thresholds"),
    (b"\x89HDF\r\n", "an HDF5 file, such as Keras writes; manidp does not read it"),
    (b"\x89PNG", "a picture (PNG), not a model"),
    (b"\xff\xd8\xff", "a picture (JPEG), not a model"),
    (b"%PDF", "a PDF document, not a model"),
    (b"\x7fELF", "a program, not a model"),
)


def looks_like(head: bytes, name: str = "FILE") -> str | None:
    """What a file with these first bytes seems to be, and what to do, in words that follow "it looks like"."""
    if not head:
        return "an empty file; perhaps its download failed"
    for beginning, description in _BEGINNINGS:
        if head.startswith(beginning):
            return description
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "a web page; download the file itself, not the page that shows it"
    if head[:1] == b"\x08" and b"\0" < head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a"):
        return "an ONNX model, which manidp writes but does not read"
    if is_ckpt(head):
        return (
            f"a MindSpore .ckpt; make a checkpoint of it with: manidp convert {name} -o model.safetensors "
            f"(and --thresholds FILE.npy, if it has gates)"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "a .safetensors file"
    return None


def is_ckpt(head: bytes) -> bool:
    """Whether these can be the first bytes of a MindSpore .ckpt: a value of some length, and in it a name."""
    length = next((index for index, byte in enumerate(head[1:11]) if byte < 0x80), None)
    return head[:1] == b"\x0a" and length is not None and head[length + 2 : length + 3] == b"\x0a"
