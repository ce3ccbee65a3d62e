"""The tests of transformers' mixins that our classes don't run, with a reason each: at most eight of all mixins.

None is about attention equivalence, padding, generation, saving or loading. A test that a mixin itself skips does not
count.
"""

EXCLUDED: dict[str, str] = {}
