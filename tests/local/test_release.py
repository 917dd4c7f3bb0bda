"""What `make release` makes: one template that needs no other file, and a stable archive."""

import copy
import json
import tomllib
import zipfile
from pathlib import Path

import pytest

from local import release
from tests import cloudformation
from tests.cloudformation import ROOT


def test_the_released_template_needs_no_other_file() -> None:
    template = release.self_contained(copy.deepcopy(cloudformation.template()), ROOT)
    loop = template["Resources"]["CheckLoop"]["Properties"]
    assert loop["Definition"] == cloudformation.definition()
    assert "SessionsOpen" in json.dumps(template["Resources"]["Dashboard"])
    for absent in ("DefinitionUri", "AWS::Include"):
        assert absent not in json.dumps(template)


def test_a_release_holds_code_template_licence_and_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = tmp_path / "built"
    (built / "CheckSessionsFunction").mkdir(parents=True)
    (built / "CheckSessionsFunction" / "module.py").touch()
    for name in ("template.yaml", "dashboard.yaml"):
        (built / name).write_bytes((ROOT / name).read_bytes())
    (built / "statemachine").symlink_to(ROOT / "statemachine")
    monkeypatch.setattr(release, "BUILT", built)
    monkeypatch.setattr(release, "DIST", tmp_path / "dist")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sums = []
    for _ in range(2):
        assert release.main() == 0
        sums.append(capsys.readouterr().out)
    assert sums[0] == sums[1] == (tmp_path / "dist/SHA256SUMS").read_text()
    with zipfile.ZipFile(tmp_path / f"dist/{release.NAME}-{version}.zip") as archive:
        names = set(archive.namelist())
        template = json.loads(archive.read(f"{release.NAME}/template.yaml"))
    for name in ("CheckSessionsFunction/module.py", "LICENSE", "README.md", "template.yaml"):
        assert f"{release.NAME}/{name}" in names
    assert template["Metadata"][release.REPOSITORY]["SemanticVersion"] == version


def test_without_a_build_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "BUILT", tmp_path)
    assert release.main() == 1
    assert "Run `make build`." in capsys.readouterr().err
