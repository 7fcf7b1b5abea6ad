"""Publish a signed bundle in a folder, and pull it into another store as a customer would."""

import os
import subprocess
import sys

import overcrank

if __name__ == "__main__":  # building starts processes
    os.environ["OVERCRANK_CONFIG"] = os.path.abspath("publisher")  # keys are kept there
    keys = [sys.executable, "-m", "overcrank", "keys"]
    line = subprocess.run([*keys, "new", "studio"], check=True, stdout=subprocess.PIPE, text=True).stdout
    (bundle,) = overcrank.build("ltx-demo", "RTX 4070", components=["denoiser"], static=True)
    (listed,) = overcrank.push("shelf", [bundle.path], "studio")
    print(f"published {listed.name}, {listed.bytes / 1e6:.1f} MB")

    os.environ["OVERCRANK_CONFIG"] = os.path.abspath("customer")
    try:
        overcrank.pull("shelf", "ltx-demo", gpu="RTX 4070", store="store-of-the-customer")
    except overcrank.OvercrankError as error:
        print(f"before the key is trusted: {error}")
    subprocess.run([*keys, "trust", *line.split()], check=True)
    pulled = overcrank.pull("shelf", "ltx-demo", gpu="RTX 4070", store="store-of-the-customer")
    print(f"pulled {pulled.name}")
