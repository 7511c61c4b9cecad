"""`python -m mlvicx_hf.commands` is `mlvicx`."""

from . import main

if __name__ == "__main__":
    main()
