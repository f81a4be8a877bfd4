"""Checkpoint files (.ckpt and .safetensors): read without copies, write by streaming, load strictly, fingerprint.

MindSpore's own readers hold a whole file in memory and load what fits, by name, without a word about the rest. Here a
file is mapped, its tensors are views, and nothing loads unless every name and every shape agrees.
"""
import hashlib
import json
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mindrlhf.cli import UserError, existing_file

# dtype names of safetensors -> (name in a .ckpt, NumPy dtype of the stored bytes; a bfloat16 is the upper half of a
# float32 and has no NumPy dtype of its own)
DTYPES = {"F32": ("Float32", np.dtype("<f4")), "F16": ("Float16", np.dtype("<f2")), "BF16": ("BFloat16", np.dtype("<u2")),
          "F64": ("Float64", np.dtype("<f8")), "I64": ("Int64", np.dtype("<i8")), "I32": ("Int32", np.dtype("<i4")),
          "U8": ("UInt8", np.dtype("u1")), "I8": ("Int8", np.dtype("i1")), "BOOL": ("Bool", np.dtype("?"))}
FROM_CKPT = {name: dtype for dtype, (name, _) in DTYPES.items()}
CHUNK = 64 << 20  # bytes of a tensor in one record of a .ckpt; MindSpore joins the records of a name


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: the parameter's name.
        dtype: a key of DTYPES.
        shape: tuple of int.
        pieces: byte views that, joined, are the tensor's little-endian content.
    """
    name: str
    dtype: str
    shape: tuple
    pieces: tuple

    @property
    def nbytes(self):
        """Size in bytes."""
        return sum(map(len, self.pieces))

    def array(self):
        """The stored values, NumPy; bfloat16 as uint16. A view of the file where it is in one piece."""
        data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        return np.frombuffer(data, DTYPES[self.dtype][1]).reshape(self.shape)

    def float32(self):
        """The values as float32, exact for bfloat16 and float16."""
        return widen(self.array(), self.dtype)


def widen(array, dtype):
    """Stored values -> float32."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def narrow(array, dtype):
    """float32 values -> stored values of dtype F32, F16 or BF16, rounded to nearest, ties to even."""
    if dtype == "BF16":
        bits = array.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(array), ((bits >> 16) | 0x40).astype(np.uint16), rounded)
    with np.errstate(over="ignore"):  # the caller looks for inf
        return array.astype(DTYPES[dtype][1])


def convert(array, source, target):
    """Stored values of one dtype -> stored values of another; unchanged where the dtypes are equal."""
    return array if source == target else narrow(widen(array, source), target)


# reading

def read(path):
    """Map a checkpoint file.

    Returns:
        dict, name -> StoredTensor, in the order of the file.

    Raises:
        UserError: the file is missing, of another kind, cut short or damaged.
    """
    path = existing_file(path, "a checkpoint")
    if path.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"{path}: a checkpoint ends in .ckpt or .safetensors; convert_weight.py makes one")
    with open(path, "rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    tensors = _read_safetensors(path, content) if path.suffix == ".safetensors" else _read_ckpt(path, content)
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def _read_safetensors(path, content):
    try:
        with safe_open(path, "np"):  # checks the header: offsets, sizes, overlaps, file length
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch or copy it again") from None
    size = int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:8 + size]))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is {entry['dtype']}; weights are one of {', '.join(DTYPES)}")
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), (content[begin:end],))
    return tensors


def _read_ckpt(path, content):
    """Walk the records of a .ckpt: a protobuf message Checkpoint of repeated Value {tag, tensor {dims, type, bytes}}."""
    tensors = {}
    try:
        position = 0
        while position < len(content):
            if bytes(content[position:position + 7]) == b"crc_num":  # MindSpore may close a file so; 10 bytes follow
                break
            _, record, position = _field(content, position, 1)
            fields = dict(_fields(record))
            name = bytes(fields[1]).decode()
            dims, kind, data = [], "", b""
            for number, value in _fields(fields[2]):
                if number == 1:
                    dims.append(value)
                elif number == 2:
                    kind = bytes(value).decode()
                elif number == 3:
                    data = value
            if kind == "str":  # a remark of the trainer, not a weight
                continue
            shape = () if dims == [0] else tuple(dims)
            before = tensors[name].pieces if name in tensors else ()
            tensors[name] = StoredTensor(name, FROM_CKPT[kind], shape, (*before, data))
        for tensor in tensors.values():
            if tensor.nbytes != math.prod(tensor.shape) * DTYPES[tensor.dtype][1].itemsize:
                raise ValueError(f"{tensor.name} is cut short")
    except (ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a whole MindSpore checkpoint ({error}); make or copy it again") from None
    return tensors


def _varint(content, position):
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number does not end")


def _field(content, position, expected=None):
    key, position = _varint(content, position)
    number, kind = key >> 3, key & 7
    if kind not in (0, 2) or (expected and (number, kind) != (expected, 2)):
        raise ValueError(f"unknown record at byte {position}")
    value, position = _varint(content, position)
    if kind == 0:
        return number, value, position
    if position + value > len(content):
        raise ValueError("the file ends too early")
    return number, content[position:position + value], position + value


def _fields(content):
    position = 0
    while position < len(content):
        number, value, position = _field(content, position)
        yield number, value


# writing

class atomic_file:
    """Context manager: a binary file that takes its final name only when the block ends well."""

    def __init__(self, path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.temporary, "wb")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        return self.file

    def __exit__(self, kind, error, trace):
        try:
            self.file.close()
            if kind is None:
                os.replace(self.temporary, self.path)
                return
        except OSError as failure:
            error = failure
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); nothing was left there") from None


def write_json(path, content):
    """Write a JSON file, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


def write(path, tensors, progress=None):
    """Write a checkpoint, tensor by tensor: one of them is in memory at a time.

    Args:
        path: a name that ends in .ckpt or .safetensors.
        tensors: list of (name, dtype, shape, make); make() returns the stored array.
        progress: called with the number of bytes after each tensor.

    Raises:
        UserError: the file cannot be written. Nothing is left under its name.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file that ends in .ckpt or .safetensors")
    if path.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"{path}: the name of a checkpoint ends in .ckpt or .safetensors")
    with atomic_file(path) as file:
        if path.suffix == ".safetensors":
            file.write(_safetensors_header(tensors))
        for name, dtype, shape, make in tensors:
            data = memoryview(np.ascontiguousarray(make(), DTYPES[dtype][1])).cast("B") if math.prod(shape) else b""
            if path.suffix == ".safetensors":
                file.write(data)
            else:
                _write_record(file, name, dtype, shape, data)
            if progress:
                progress(len(data))


def _safetensors_header(tensors):
    header, offset = {"__metadata__": {"format": "np"}}, 0
    for name, dtype, shape, _ in tensors:
        end = offset + math.prod(shape) * DTYPES[dtype][1].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_record(file, name, dtype, shape, data):
    for begin in range(0, max(len(data), 1), CHUNK):
        piece = data[begin:begin + CHUNK]
        dims = b"".join(b"\x08" + _encode(size) for size in shape)
        head = dims + _bytes_field(2, DTYPES[dtype][0].encode()) + b"\x1a" + _encode(len(piece))
        tensor = b"\x12" + _encode(len(head) + len(piece)) + head
        tag = _bytes_field(1, name.encode())
        file.write(b"\x0a" + _encode(len(tag) + len(tensor) + len(piece)) + tag + tensor)
        file.write(piece)


def _encode(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number, content):
    return bytes([number << 3 | 2]) + _encode(len(content)) + content


# identity

def fingerprint(tensors):
    """Identity of a set of weights: SHA-256 over the names, dtypes, shapes and contents, whatever file holds them.

    Args:
        tensors: dict, name -> StoredTensor.

    Returns:
        64 hex digits. Tensors are hashed side by side; order in the file does not count.
    """
    def one(tensor):
        digest = hashlib.sha256(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for piece in tensor.pieces:
            digest.update(piece)
        return digest.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(one, [tensors[name] for name in sorted(tensors)])
        return hashlib.sha256(b"".join(digests)).hexdigest()


# loading

def difference(expected, found, *, limit=3):
    """What a file's shapes lack, have too many, or have otherwise than expected, in words; empty where they agree."""
    def named(names):
        return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    shapes = [f"{name} ({list(found[name])} in the file, {list(expected[name])} in the model)" for name in expected
              if name in found and tuple(found[name]) != tuple(expected[name])]
    parts = [("missing", missing), ("not in the model", unknown), ("of another shape", shapes)]
    return "; ".join(f"{title}: {named(names)}" for title, names in parts if names)


def load_strictly(network, path, *, training_state=False, names=None):
    """Load every parameter of a network from a file, and every tensor of the file into the network.

    Args:
        network: a Cell; its parameters' names and shapes decide.
        path: a .ckpt or .safetensors file with the whole (unsharded) weights.
        training_state: allow the optimizer's and the trainer's own tensors in the file (a resumed run).
        names: function from a name to whether this file is responsible for it; None: for all.

    Returns:
        dict, name -> StoredTensor, what was loaded.

    Raises:
        UserError: naming each kind of difference; nothing was loaded then.
    """
    from mindspore import Tensor
    if not path:
        raise UserError("no weights given; --load_checkpoint names the checkpoint that convert_weight.py made")
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; --load_checkpoint takes one file. Trained weights in rank_* folders "
                        "become one file with transform_checkpoint.py")
    stored = read(path)
    parameters = {parameter.name: parameter for parameter in network.get_parameters()
                  if names is None or names(parameter.name)}
    if training_state:
        stored = {name: tensor for name, tensor in stored.items() if name in parameters}
    problem = difference({name: parameter.shape for name, parameter in parameters.items()},
                         {name: tensor.shape for name, tensor in stored.items()})
    if problem:
        raise UserError(f"{path}: does not fit the model of this YAML. {problem}")
    for name, parameter in parameters.items():
        values = np.require(stored[name].float32(), requirements=["ALIGNED", "C_CONTIGUOUS"])
        parameter.set_data(Tensor(values, parameter.dtype))
    return stored


def steps_done(path):
    """Number of training steps behind a checkpoint that MindFormers' CheckpointMonitor wrote.

    Raises:
        UserError: the file says nothing of steps; it is no training state.
    """
    tensors = read(path)
    if "step_num" not in tensors:
        raise UserError(f"{path}: is no training state; resume_training needs a file of output/checkpoint/rank_*")
    return int(tensors["step_num"].array())
