"""The one compiled part of the package, which pyproject.toml cannot describe whole: all else is said there.

It is plain C that ctypes calls, the same for every version of Python. Where it cannot be built the package installs
without it, and says so when it would be used.
"""

from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "caco_scale/data/augment_cpu.c"
EXACT_ENOUGH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only"]
# -O3 unrolls the blur's loop before it becomes vector instructions, which takes 1.5 times as long (GCC 12).
QUICK = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]

setup(
    ext_modules=[
        Extension(
            "caco_scale.data._augment_cpu",
            [SOURCE],
            define_macros=[("SOURCE_SHA256", f'"{sha256(Path(SOURCE).read_bytes()).hexdigest()}"')],
            extra_compile_args=[*QUICK, *EXACT_ENOUGH, "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
