"""Holds the manifests of this folder against Kubernetes' own schemas, offline.

    python deploy/check.py

A JobSet is no type of Kubernetes itself; the jobs that it makes are, so those are
checked in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

VERSION = "1.33"


def resources(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The resources of a file by name, JobSets as the jobs that they make."""
    for document in yaml.safe_load_all(path.read_text()):
        name = f"{path.name}: {document['kind']} {document['metadata']['name']}"
        if document["kind"] != "JobSet":
            yield name, document
            continue
        for job in document["spec"]["replicatedJobs"]:
            made = {"apiVersion": "batch/v1", "kind": "Job", **job["template"]}
            made["metadata"] = {"name": job["name"]}
            yield f"{name}, job {job['name']}", made


def main() -> int:
    """Checks every manifest; the exit code."""
    failed = 0
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        for name, document in resources(path):
            try:
                kubernetes_validate.validate(document, VERSION, strict=True)
            except kubernetes_validate.ValidationError as error:
                print(f"{name}: {error}", file=sys.stderr)
                failed = 1
            else:
                print(f"{name}: valid for Kubernetes {VERSION}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
