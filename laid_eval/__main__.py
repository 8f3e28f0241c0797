"""`python -m laid_eval`: the command line."""

from laid_eval.cli import main

if __name__ == "__main__":
    main()
