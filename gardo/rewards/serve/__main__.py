"""``python -m gardo.rewards.serve --rewards NAME[,NAME...]``: serve rewards over HTTP."""

from gardo.rewards.serve.cli import main

if __name__ == "__main__":
    main()
