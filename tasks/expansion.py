"""Prompts, crossed with the attribute axes."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.config import ExpansionConfig
from popalign_core.controls import load_controls
from popalign_core.expansion import prompts_of
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.tables import write_rows
from tasks.run import as_row, reference


@task(cache_policy=NO_CACHE)
def write_prompts(workspace: str, run_id: str, config: ExpansionConfig) -> ArtifactRef:
    """Expands the prompt sets and commits `prompts`."""
    ref = reference(workspace, run_id, "prompts", "all")
    if is_committed(ref):
        return ref
    prompts = [*prompts_of(config), *load_controls(config.controls, config.prefix)]
    with staged_artifact(ref) as folder:
        write_rows(folder, "prompts", [as_row(run_id, prompt) for prompt in prompts])
    return ref
