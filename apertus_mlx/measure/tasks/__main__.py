"""lm-eval's own command, which then knows the model `apertus_mlx`."""

from apertus_mlx.measure.tasks import peer  # noqa: F401 - registers the model

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
