"""Builds the parts that are not Python: BPF objects (clang -target bpf) and the Cython extensions.

Everything else about the package stands in pyproject.toml. The compiled BPF objects travel in sdist and wheel, so that
clang and llvm are needed only to build from a git checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
OBJECTS = HERE / "fastrecv" / "objects"


def compile_bpf() -> None:
    """Compile bpf/*.bpf.c whose object is missing or older; without clang the objects of an sdist serve."""
    for source in sorted((HERE / "bpf").glob("*.bpf.c")):
        target = OBJECTS / source.name.replace(".c", ".o")
        newest = max(path.stat().st_mtime for path in [source, *source.parent.glob("*.h")])
        if target.exists() and (target.stat().st_mtime >= newest or not shutil.which("clang")):
            continue
        if not shutil.which("clang") or not shutil.which("llvm-strip"):
            raise SystemExit("building fastrecv from a git checkout needs clang and llvm: apt install clang llvm")
        OBJECTS.mkdir(exist_ok=True)
        multiarch = sysconfig.get_config_var("MULTIARCH") or ""
        subprocess.run(
            [
                *("clang", "-target", "bpf", "-mcpu=v3", "-O2", "-g", f"-I/usr/include/{multiarch}"),
                *("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"),
                *("-c", str(source), "-o", str(target)),
            ],
            check=True,
        )
        # BTF stays, DWARF with this machine's paths goes.
        subprocess.run(["llvm-strip", "-g", str(target)], check=True)


class BuildExt(build_ext):
    def initialize_options(self) -> None:
        super().initialize_options()
        self.parallel = os.cpu_count()  # compilers, unless -j says how many

    def run(self) -> None:
        compile_bpf()
        translate(self.extensions)
        super().run()


class Sdist(sdist):
    def run(self) -> None:
        compile_bpf()
        super().run()


def extensions() -> list[Extension]:
    common: dict[str, Any] = {
        "include_dirs": [numpy.get_include()],
        "define_macros": [("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        "extra_compile_args": ["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    }
    if os.environ.get("FASTRECV_SANITIZE") == "1":  # `make sanitize`
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        common["extra_compile_args"] += [*sanitize, "-g", "-O1"]
        common["extra_link_args"] = sanitize
    # The receive core works where libbpf is absent: only the doors to libbpf and libxdp link to them.
    linked: dict[str, list[str]] = {"_recv": [], "_flow": [], "_bpf": ["bpf"]}
    shared = {"_recv": [], "_flow": [], "_bpf": [], "_xsk": ["bpf/frame.h"]}
    if has_libxdp():
        linked["_xsk"] = ["xdp", "bpf"]
        common["include_dirs"].append("bpf")  # the parser that the BPF program shares
    return [
        Extension(
            f"fastrecv.{package}.{path.stem}", [str(path)], libraries=libraries, depends=shared[package], **common
        )
        for package, libraries in linked.items()
        for path in sorted(Path("fastrecv", package).glob("*.pyx"))
    ]


def translate(extensions: list[Extension]) -> None:
    """Have Cython write the C, which only compiling needs: an sdist has none, and takes a third of the time without."""
    made = cythonize(
        extensions,
        compiler_directives={"language_level": 3, "boundscheck": False, "wraparound": False, "binding": True},
    )
    sources = {extension.name: extension.sources for extension in made}
    for extension in extensions:
        extension.sources = sources[extension.name]


def has_libxdp() -> bool:
    """Whether AF_XDP can be built; it is optional, and fastrecv.xdp says what to install where it is missing."""
    if shutil.which("pkg-config") and subprocess.run(["pkg-config", "--exists", "libxdp"], check=False).returncode == 0:
        return True
    print("building without AF_XDP: apt install libxdp-dev pkg-config brings it")
    return False


setup(
    cmdclass={"build_ext": BuildExt, "sdist": Sdist},
    ext_modules=extensions(),
)
