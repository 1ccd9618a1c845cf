"""Holds the manifests of this folder against Kubernetes' own schemas, offline.

    python deploy/check.py

A JobSet and a LeaderWorkerSet are no types of Kubernetes itself; the jobs and the pods
that they make are, so those are checked in their place. Of other operators' types there
is no schema here: that they have a kind, a name and a spec is all that is looked at.
Every manifest of a kustomization is named by it, and what it names is there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

VERSION = "1.33"
HERE = Path(__file__).parent
OPERATORS = {"cert-manager.io/v1", "monitoring.coreos.com/v1"}


def resources(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The resources of Kubernetes' own types that a document is or makes, by name."""
    name = f"{document['kind']} {document['metadata']['name']}"
    spec = document["spec"]
    if document["kind"] == "JobSet":
        for job in spec["replicatedJobs"]:
            made = {"apiVersion": "batch/v1", "kind": "Job", **job["template"]}
            made["metadata"] = {"name": job["name"]}
            yield f"{name}, job {job['name']}", made
    elif document["kind"] == "LeaderWorkerSet":
        pod = spec["leaderWorkerTemplate"]["workerTemplate"]
        made = {"apiVersion": "v1", "kind": "Pod", "spec": pod["spec"]}
        made["metadata"] = {"name": document["metadata"]["name"], **pod["metadata"]}
        yield f"{name}, its workers", made
    elif document["apiVersion"] not in OPERATORS:
        yield name, document


def unlisted(kustomization: Path) -> list[str]:
    """What a kustomization names and is not there, or the other way round."""
    folder = kustomization.parent
    named = set(yaml.safe_load(kustomization.read_text())["resources"])
    there = {x.name for x in folder.glob("*.yaml")} - {kustomization.name}
    return [f"{folder.relative_to(HERE)}/{name}" for name in sorted(named ^ there)]


def faults(path: Path) -> Iterator[str]:
    """What is wrong with the manifests of a file; says what is right."""
    where = path.relative_to(HERE)
    for document in yaml.safe_load_all(path.read_text()):
        for name, resource in resources(document):
            try:
                kubernetes_validate.validate(resource, VERSION, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{where}: {name}: {error}"
            else:
                print(f"{where}: {name}: valid for Kubernetes {VERSION}")


def main() -> int:
    """Checks every manifest; the exit code."""
    found: list[str] = []
    for path in sorted(HERE.rglob("*.yaml")):
        if path.name == "kustomization.yaml":
            found += [f"{name}: listed or there, not both" for name in unlisted(path)]
        else:
            found += faults(path)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
