"""`make release`: what a release consists of, from the output of `make build`, in dist/.

The archive holds the functions and one template that needs no other file, so that it can also be
published to the Serverless Application Repository, which takes a template and the code only.
"""

import hashlib
import json
import shutil
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# samtranslator has no types.
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from local.package import BUILT

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
NAME = "checkout-session-monitor"
REPOSITORY = "AWS::ServerlessRepo::Application"
# The oldest time that a ZIP archive can hold: equal contents make an equal archive.
NO_TIME = (1980, 1, 1, 0, 0, 0)


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    built = ROOT / BUILT
    if not (built / "template.yaml").is_file():
        print(f"❌ There is no build in {BUILT}. Run `make build`.", file=sys.stderr)
        return 1
    shutil.rmtree(DIST, ignore_errors=True)
    release = DIST / NAME
    shutil.copytree(built, release, ignore=shutil.ignore_patterns("emulated.json"))
    template = self_contained(yaml_parse((built / "template.yaml").read_text("utf-8")), built)
    for name in ("LICENSE", "README.md"):
        shutil.copy(ROOT / name, release)
    template["Metadata"][REPOSITORY] = metadata(project)
    (release / "template.yaml").write_text(json.dumps(template, indent=1), encoding="utf-8")
    archive = DIST / f"{NAME}-{project['version']}.zip"
    pack(release, archive)
    sums = [f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}\n"]
    (DIST / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    print("".join(sums), end="")
    return 0


def self_contained(template: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A template with the loop's definition and the dashboard, which lie beside it, inside."""

    def read(name: str) -> Any:  # noqa: ANN401 (YAML)
        return yaml.safe_load((directory / name).read_text(encoding="utf-8"))

    loop = template["Resources"]["CheckLoop"]["Properties"]
    loop["Definition"] = read(loop.pop("DefinitionUri"))
    dashboard = template["Resources"]["Dashboard"]["Properties"]
    include = dashboard["DashboardBody"]["Fn::Transform"]["Parameters"]["Location"]
    dashboard["DashboardBody"] = read(include)
    return template


def metadata(project: Mapping[str, Any]) -> dict[str, object]:
    """What the Serverless Application Repository shows."""
    return {
        "Name": NAME,
        "Description": project["description"],
        "Author": NAME,
        "SpdxLicenseId": project["license"],
        "LicenseUrl": "LICENSE",
        "ReadmeUrl": "README.md",
        "Labels": ["checkout", "payments", "monitoring", "lambda", "step-functions"],
        "SemanticVersion": project["version"],
    }


def pack(directory: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(str(file.relative_to(directory.parent)), NO_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, file.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
