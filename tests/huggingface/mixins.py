"""Fetch the test mixins of the installed transformers, which its source distribution carries: tests/test_*_common.py.

    python -m tests.huggingface.mixins                     download the sdist with pip, unpack its mixins below .mixins/
    python -m tests.huggingface.mixins --clone DIR         take them from a clone of transformers at the same version
    python -m tests.huggingface.mixins --report            say which of them the tests run

The sdist lacks the mixins of `tests/generation` and `tests/exporters`, which a clone has. Empty classes stand in for
them otherwise. What a clone has given stays when the sdist is fetched again.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".mixins"
PACKAGE = "transformers_tests"
# What the mixins import of modules that the sdist lacks, and what stands in for it.
MISSING = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n\n\nclass ExportGenerateTesterMixin:\n    pass\n",
}
# Replaced in any case: the first needs httpx, the second the Hub. The mixins put `utils` onto `sys.path`.
REPLACED = {
    "transformers_tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url, *args, **kwargs):\n    return url\n",
}


def folder() -> Path:
    """Where the mixins of the installed version lie; goes onto `sys.path`."""
    return FOLDER / version("transformers")


def fetch(clone: Path | None = None) -> Path:
    """Lay the mixins out as a package below `folder()`. Returns that folder. clone: take them from there."""
    target = folder()
    package = target / PACKAGE
    with tempfile.TemporaryDirectory() as temporary:
        source = clone or _sdist(Path(temporary))
        for file in sorted((source / "tests").rglob("*.py")):
            place = package / file.relative_to(source / "tests")
            if place.parent == package or str(place.relative_to(package)) in MISSING:
                place.parent.mkdir(parents=True, exist_ok=True)
                text = file.read_text(encoding="utf-8").replace("from tests.", f"from {PACKAGE}.")  # `tests` is ours
                place.write_text(text, encoding="utf-8")
    for name, replacement in MISSING.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        if not file.exists():
            file.write_text(replacement, encoding="utf-8")
    for name, replacement in REPLACED.items():
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(replacement, encoding="utf-8")
    (package / "utils" / "__init__.py").touch()
    (package / "__init__.py").touch()
    return target


def report() -> str:
    """Which mixins of the installed version the tests run."""
    this, package = f"transformers {version('transformers')}", folder() / PACKAGE
    command = "python -m tests.huggingface.mixins"
    if not package.exists():
        return f"{this}: none of its own tests ran, since its mixins are missing; download them with `{command}`"
    name = "generation/test_utils.py"
    if (package / name).read_text(encoding="utf-8") == MISSING[name]:
        return (
            f"{this}: its mixins for models, processors and configurations ran. The mixin for generation did not, "
            f"because the sdist lacks tests/generation; take it from a clone with `{command} --clone DIR`"
        )
    return f"{this}: its mixins for models, generation, processors and configurations ran"


def _sdist(temporary: Path) -> Path:
    """Download and unpack the sdist of the installed version."""
    wanted = f"transformers=={version('transformers')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers", wanted]
    subprocess.run([*command, "--dest", str(temporary)], check=True)
    with tarfile.open(next(temporary.glob("*.tar.gz"))) as archive:
        archive.extractall(temporary, filter="data")
    return next(path for path in temporary.iterdir() if path.is_dir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", type=Path)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    try:
        print(report() if args.report else fetch(args.clone))
    except subprocess.CalledProcessError:
        sys.exit("the sdist can't be downloaded; the tests run only those mixins that were fetched before")


if __name__ == "__main__":
    main()
