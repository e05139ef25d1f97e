"""Read what `cnsdiff launch k8s` renders."""

from typing import Any


def pod_spec(trees: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec of the Job, whatever holds it, and the spec of its pod."""
    for tree in trees:
        spec = tree.get("spec", {})
        if tree["kind"] == "Job":
            return spec, spec["template"]["spec"]
        if tree["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
            return spec, spec["template"]["spec"]
        if tree["kind"] in ("JobSet", "TrainingRuntime"):
            spec = spec.get("template", tree)["spec"]["replicatedJobs"][0]["template"]["spec"]
            return spec, spec["template"]["spec"]
    raise AssertionError("no pod")


def action(job_spec: dict[str, Any], code: int, disrupted: bool = False) -> str:
    """What the Job controller does with a failed pod: the action of the first rule that matches."""
    for rule in job_spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and codes["operator"] == "In" and code in codes["values"]:
            return str(rule["action"])
        conditions = rule.get("onPodConditions", [])
        if disrupted and any(c["type"] == "DisruptionTarget" for c in conditions):
            return str(rule["action"])
    return "Count"
