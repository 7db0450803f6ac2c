"""What is released: an sdist and a wheel that carry the compiled BPF objects, a wheel that carries libbpf too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from fastrecv.bench.runner import NEEDS

pytestmark = pytest.mark.alone  # the released bench, too, expedites RCU on the whole host

ROOT = Path(__file__).parents[2]
OBJECTS = {f"fastrecv/objects/{path.name.replace('.c', '.o')}" for path in (ROOT / "bpf").glob("*.bpf.c")}


def run(*arguments: str | Path, **options: object) -> str:
    done = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, check=False,
                          **options)  # type: ignore[call-overload] # options of subprocess.run, given on as they are  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def without_clang(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment with a PATH on which everything is found but clang and llvm."""
    folder = tmp_path_factory.mktemp("bin")
    for directory in [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)]:
        if not Path(directory).is_dir():
            continue
        for program in Path(directory).iterdir():
            if not program.name.startswith(("clang", "llvm")) and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    environment = {**os.environ, "PATH": str(folder)}
    assert shutil.which("clang", path=str(folder)) is None
    return environment


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "objects", "*.c~")
    shutil.copytree(ROOT, source, ignore=ignored)
    for generated in (source / "fastrecv").glob("_*/*.c"):
        generated.unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, source)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, without_clang: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist where there is no clang: its objects must serve."""
    folder = tmp_path_factory.mktemp("wheel")
    run("tar", "-xf", sdist, "-C", folder)  # tarfile's safe extraction is not in every 3.11
    (source,) = folder.iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, source, env=without_clang)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def repaired(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repaired")
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel, env=tools)
    (built,) = folder.glob("*.whl")
    return built


def install(folder: Path, wheel: Path | str) -> Path:
    """A clean virtual environment with the wheel and what it depends on."""
    venv.create(folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile", wheel)
    return python


def test_the_sdist_has_sources_and_objects_and_nothing_built_for_this_machine(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert OBJECTS
    assert names >= OBJECTS | {f"bpf/{path.name}" for path in (ROOT / "bpf").iterdir()}
    assert names >= {"LICENSE", "README.md", "fastrecv/_bpf/maps.pyx", "fastrecv/_bpf/libbpf.pxd", "fastrecv/py.typed",
                     "fastrecv/_recv/batch.pyx", "fastrecv/_recv/linux.pxd", "fastrecv/bench/letter.toml",
                     "fastrecv/bench/limit.c", "fastrecv/bench/report.html.j2",
                     "fastrecv/bench/xsk_limit.c"}  # fmt: skip
    ours = ("bpf/", "fastrecv/bench/", "tests/")
    assert not [name for name in names if name.endswith((".so", ".c")) and not name.startswith(ours)]


def test_the_wheel_has_objects_data_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= OBJECTS | {"fastrecv/py.typed", "fastrecv/_bpf/__init__.pyi", "fastrecv/_recv/__init__.pyi",
                               "fastrecv/adapters/asyncio.py", "fastrecv/bench/letter.toml", "fastrecv/bench/limit.c",
                               "fastrecv/bench/report.html.j2", "fastrecv/bench/xsk_limit.c"}  # fmt: skip
    assert not [name for name in names if name.startswith(("tests/", "bench/", "bpf/"))]


def test_the_released_wheel_runs_in_a_clean_environment_with_its_own_libbpf(
    repaired: Path, without_clang: dict[str, str], tmp_path: Path
) -> None:
    assert "manylinux" in repaired.name
    python = install(tmp_path / "venv", repaired)
    program = (
        "from fastrecv import bpf\n"
        "names = ('assign', 'decoy', 'flood', 'letter', 'swallow')\n"
        "for name in names:\n"
        "    with bpf.packaged(name) as opened: print(name, sorted(opened.programs))\n"
        "print([line.split()[-1] for line in open('/proc/self/maps') if 'libbpf' in line][0])\n"
    )
    lines = run(python, "-c", program, env=without_clang, cwd=tmp_path).splitlines()
    assert lines[:-1] == [f"{name} ['{name}']" for name in ("assign", "decoy", "flood", "letter", "swallow")]
    assert "fastrecv.libs/libbpf" in lines[-1]

    bench = subprocess.run([python, "-m", "fastrecv.bench"], capture_output=True, text=True, check=False, cwd=tmp_path,
                           env=without_clang)  # fmt: skip
    assert bench.returncode == 77  # installed without the extra
    assert bench.stderr == "fastrecv.bench: the bench needs click: pip install 'fastrecv[bench]'\n"


@pytest.mark.needs(*NEEDS)
def test_the_released_wheel_measures(repaired: Path, without_clang: dict[str, str], tmp_path: Path) -> None:
    python = install(tmp_path / "venv", f"{repaired}[bench]")
    arguments = ("--flood", "udp4", "--seconds", "1", "--json", "out.json")
    done = subprocess.run([python, "-m", "fastrecv.bench", *arguments], capture_output=True, text=True, check=False,
                          cwd=tmp_path, env=without_clang)  # fmt: skip
    kept = tmp_path / "out.json"
    assert kept.exists(), f"nothing was measured (exit {done.returncode}): {done.stderr}"
    gates = {gate["name"]: gate["passed"] for gate in json.loads(kept.read_text())["floods"][0]["gates"]}
    assert gates["exact counts"], done.stdout
    assert gates["one run a packet"], done.stdout
    assert "udp4: UDP, IPv4, zero length" in done.stdout


def test_where_libbpf_is_absent_batches_are_received_and_bpf_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    python = install(tmp_path / "venv", wheel)
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for extension in (tmp_path / "venv").glob("lib/*/site-packages/fastrecv/_bpf/*.so"):
        run("patchelf", "--replace-needed", "libbpf.so.1", "libbpf-absent.so.1", extension, env=tools)
    program = (
        "import fastrecv, sys\n"
        "with fastrecv.Receiver.bind(('127.0.0.1', 0)) as receiver:\n"
        "    receiver.send([b'one', b'two'], receiver.address)\n"
        "    print([bytes(view) for view, _ in receiver.recv(5)], 'fastrecv.bpf' in sys.modules)\n"
    )
    assert run(python, "-c", program, cwd=tmp_path) == "[b'one', b'two'] False\n"
    done = subprocess.run(
        [python, "-c", "import fastrecv.bpf"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastrecv's BPF part cannot be loaded (libbpf-absent.so.1: ")
    assert "apt install libbpf1" in last
