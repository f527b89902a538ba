from synthetic_runs import builders, demo_run, finished_run, finished_stage, hub, stage_run  # noqa: F401
