"""The examples for SLURM and Kubernetes: what can be checked without a cluster."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

DOCS = Path(__file__).resolve().parents[2] / "docs"

# Of sbatch's manual, those that make sense here, with the form of their values.
SBATCH = {
    "job-name": r"\w+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
    "requeue": None,
    "signal": r"([RB]{1,2}:)?([A-Z]+\d*|\d+)(@\d{1,5})?",
    "open-mode": r"append|truncate",
    "output": r"[\w%./-]+",
}


def test_every_sbatch_option_is_in_the_manual():
    text = (DOCS / "slurm.sh").read_text()
    head, _, rest = text.partition("\n\n")
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", head, re.MULTILINE)
    assert len(options) == head.count("#SBATCH") and "#SBATCH" not in rest
    for name, value in options:
        form = SBATCH[name]
        assert value == "" if form is None else re.fullmatch(form, value), name


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (75, 9, True), (1, 4, True), (1, 5, False), (137, 0, True)],
)
def test_the_script_requeues_what_a_restart_can_mend(tmp_path, status, restarts, requeued):
    """The script itself, with a stand-in for SLURM's commands."""
    for name, text in (("srun", f"exit {status}"), ("scontrol", f"echo $* > {tmp_path}/called")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", str(DOCS / "slurm.sh"), "config", "workdir"], env=environment, timeout=60)
    assert done.returncode == status
    called = tmp_path / "called"
    assert (called.read_text() == "requeue 7\n") if requeued else not called.exists()


# A hand-written schema of the fields used, after jobset.x-k8s.io/v1alpha2 and batch/v1. A list holds the schema of its
# items, a tuple the values allowed, a type any value of it.
EXIT_CODES = {"containerName": str, "operator": ("In", "NotIn"), "values": [int]}
CONTAINER = {
    "name": str,
    "image": str,
    "workingDir": str,
    "env": [{"name": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "command": [str],
    "args": [str],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": ("Never",),  # the API demands it with a podFailurePolicy
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [
        {"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": ("Memory",)}}
    ],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": ("Indexed", "NonIndexed"),
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": ("FailJob", "FailIndex", "Ignore", "Count"), "onExitCodes": EXIT_CODES}]
    },
    "template": {"spec": POD},
}
JOB_SET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": str},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": str,
                    "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                    "onJobFailureReasons": [("PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded")],
                }
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def wrong(value, schema, place: str) -> list[str]:
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place}: not a mapping"]
        found = [f"{place}.{name}: unknown" for name in value.keys() - schema.keys()]
        for name in value.keys() & schema.keys():
            found += wrong(value[name], schema[name], f"{place}.{name}")
        return found
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place}: not a list"]
        return [error for i, item in enumerate(value) for error in wrong(item, schema[0], f"{place}[{i}]")]
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{place}: {value!r}"]
    return [] if type(value) is schema else [f"{place}: {value!r} is not {schema.__name__}"]


def test_the_jobset_has_known_fields_and_treats_the_statuses_as_the_script_does():
    found = yaml.safe_load((DOCS / "jobset.yaml").read_text())
    assert wrong(found, JOB_SET, "") == []
    (job,) = (replicated["template"]["spec"] for replicated in found["spec"]["replicatedJobs"])
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]}
    assert rules == {"FailJob": [2], "Ignore": [75]}
    (container,) = job["template"]["spec"]["containers"]
    assert container["name"] == "train" and job["parallelism"] == job["completions"]


@pytest.mark.parametrize("change", [{"restartPolicyy": "Never"}, {"terminationGracePeriodSeconds": "120"}])
def test_the_schema_refuses_wrong_fields(change):
    assert wrong({"restartPolicy": "Never"} | change, POD, "")
