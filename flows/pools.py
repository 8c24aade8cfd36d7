"""Names that this project's flows and Prefect's server share. Imports nothing: the command line is quick with it."""

CPU_POOL, GPU_POOL = "popalign-cpu", "popalign-gpu"
# Where runs of deployments compute, unless they say it themselves.
PLACEMENT_VARIABLE = "popalign_placement"
