from tests.trained import finished_run, small_model  # noqa: F401
