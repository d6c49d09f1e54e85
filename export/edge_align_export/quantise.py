"""llama.cpp's own quantiser, in a process of its own: a crash or Ctrl-C in C code ends that process, not this one.

    python -m edge_align_export.quantise SOURCE TARGET FTYPE THREADS

prints `i/n` for each tensor and, when it fails, `! ` and llama.cpp's reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from edge_align.errors import BackendError

FTYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_K_S": 16,
    "Q5_1": 9,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "Q4_1": 3,
    "Q4_0": 2,
    "IQ4_XS": 30,
    "IQ4_NL": 25,
    "Q3_K_L": 13,
    "Q3_K_M": 12,
    "Q3_K_S": 11,
    "Q2_K": 10,
}
"""llama.cpp's `llama_ftype` of every type offered, the largest first; those under Q2_K need data to be any good."""

BITS = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8": 8.5,
    "Q6": 6.6,
    "Q5": 6.0,
    "Q4": 5.0,
    "IQ4": 4.6,
    "Q3": 4.4,
    "Q2": 3.4,
}
"""Upper bounds of bits per weight, by the beginning of a type's name; embeddings of small models stay wider."""

_STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


def bits_per_weight(quant: str) -> float:
    """An upper bound for files of this type."""
    return BITS.get(quant) or BITS[quant.split("_")[0]]


def quantise(source: Path, target: Path, quant: str, *, threads: int = 0, tell: Callable[[float], None]) -> None:
    """Write `source` (GGUF) as `target` in the type `quant`. Not atomic: give a temporary path. Raises BackendError."""
    command = [sys.executable, "-m", __name__, str(source), str(target), str(FTYPES[quant]), str(threads)]
    paths = os.pathsep.join(path for path in sys.path if path)
    reason = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("! "):
                    reason = reason or line[2:].strip()
                elif "/" in line:
                    done, total = line.split("/")
                    tell(int(done) / int(total))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        how = f"it ended with signal {-process.returncode}" if process.returncode < 0 else "it does not say why"
        raise BackendError(f"llama.cpp could not quantise {source.name} to {quant}: {reason or how}")


def main(arguments: list[str]) -> int:
    """The child process."""
    import signal

    from llama_cpp import llama_cpp as C

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # die at once; Python would wait for C to return
    source, target, ftype, threads = arguments

    def log(level: int, text: bytes, _data: object) -> None:
        line = " ".join(text.decode("utf-8", "replace").split())
        step = _STEP.search(line)
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            sys.stdout.write(f"! {line}\n")
        elif step:
            sys.stdout.write(f"{step[1]}/{step[2]}\n")
        sys.stdout.flush()

    callback = C.llama_log_callback(log)
    C.llama_log_set(callback, None)
    C.llama_backend_init()
    params = C.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = int(ftype), int(threads), True
    return int(C.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
