"""transformers' own common tests on the models: `python -m common_tests` in tools/."""
