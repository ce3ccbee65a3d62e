from tests.train.conftest import arguments, bases, run_training, train_file  # noqa: F401
