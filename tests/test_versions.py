"""Known mismatches of versions are named at start, with the command that fixes them."""

from importlib.metadata import PackageNotFoundError

import pytest

from qwhisper import versions
from qwhisper.cli import main
from qwhisper.errors import UsageError
from qwhisper.versions import check_versions

SOUND = {
    "accelerate": "1.15.0",
    "transformers": "5.24.0",
    "torch": "2.13.0+cpu",
    "peft": "0.21.2",
    "bitsandbytes": "0.50",
}


@pytest.fixture
def installed(monkeypatch):
    """A table of installed versions to change."""
    table = dict(SOUND)

    def version(package):
        if package not in table:
            raise PackageNotFoundError(package)
        return table[package]

    monkeypatch.setattr(versions, "version", version)
    return table


@pytest.mark.parametrize("torch", ["2.11.0", "2.13.0+cu130", "2.14.0a0", "3.0"])
def test_supported_versions_pass(installed, torch):
    installed["torch"] = torch
    installed["transformers"] = "5.16.1"
    check_versions(quantized=True)


def test_this_installation_passes():
    check_versions()


@pytest.mark.parametrize(
    ("package", "found", "fix"),
    [
        ("accelerate", "1.2.1", "pip install -U 'accelerate>=1.3'"),
        ("transformers", "4.57.3", "pip install -U 'transformers>=5.16.1'"),
        ("torch", "2.9.1+cu128", "pip install -U 'torch>=2.11'"),
        ("peft", "0.20.0", "pip install -U 'peft>=0.21'"),
    ],
)
def test_an_old_package_is_named_with_its_version_and_the_cure(installed, package, found, fix):
    installed[package] = found
    with pytest.raises(UsageError) as caught:
        check_versions()
    assert f"{package} {found} is too old" in str(caught.value)
    assert str(caught.value).endswith(fix)


def test_old_accelerate_is_named_with_the_error_that_it_would_cause(installed):
    installed["accelerate"] = "1.2.0"
    with pytest.raises(UsageError, match=r"unwrap_model.*keep_torch_compile"):
        check_versions()


def test_a_missing_package_is_named(installed):
    del installed["peft"]
    with pytest.raises(UsageError, match="peft is not installed; fix it with: pip install"):
        check_versions()


def test_4bit_without_bitsandbytes_names_the_extra(installed, capsys):
    del installed["bitsandbytes"]
    check_versions()
    assert main(["train", "--train_file", "x", "--output_dir", "y", "--load_in_4bit"]) == 2
    assert "pip install 'qwhisper[quant]'" in capsys.readouterr().err
