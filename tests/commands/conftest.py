from tests.data.conftest import recordings  # noqa: F401
from tests.dialogue_files import write  # noqa: F401
