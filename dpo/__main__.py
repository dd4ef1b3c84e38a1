"""`python -m dpo NAME WORDS`, the same as `dpo NAME WORDS`."""

from dpo.front.main import main

if __name__ == "__main__":
    main()
