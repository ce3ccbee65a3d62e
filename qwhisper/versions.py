"""Check the versions of installed packages, from metadata alone; an error has the command that fixes it."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from qwhisper.errors import UsageError

# Package, oldest version, what goes wrong below it.
REQUIRED = (
    (
        "accelerate",
        "1.3",
        "transformers calls its unwrap_model with keep_torch_compile, which it does not know "
        "(TypeError: unwrap_model() got an unexpected keyword argument 'keep_torch_compile')",
    ),
    ("transformers", "5.16.1", "its model classes differ from those that qwhisper uses"),
    ("torch", "2.11", "packed training needs torch.nn.attention.varlen of that version"),
    ("peft", "0.21", "older versions are not tested with transformers 5"),
)


def check_versions(*, quantized: bool = False) -> None:
    """Raises UsageError for a package that is missing or too old; `quantized` asks for bitsandbytes as well."""
    for package, oldest, reason in REQUIRED:
        found = _installed(package)
        fix = f"pip install -U '{package}>={oldest}'"
        if found is None:
            raise UsageError(f"{package} is not installed; fix it with: {fix}")
        if Version(found) < Version(oldest):
            raise UsageError(f"{package} {found} is too old, {oldest} is needed: {reason}; fix it with: {fix}")
    if quantized and _installed("bitsandbytes") is None:
        raise UsageError(
            "a language model in 4 bits (--load_in_4bit, or saved so) needs bitsandbytes, which is not installed; fix "
            "it with: pip install 'qwhisper[quant]'"
        )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
