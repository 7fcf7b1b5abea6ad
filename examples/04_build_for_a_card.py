"""Build engines for a card that is not here, look at what they do, and check their graphs."""

import overcrank

if __name__ == "__main__":  # building starts processes
    (bundle,) = overcrank.build("ltx-demo", "RTX 4070")
    print(bundle.path.name, "was in the store" if bundle.cached else "was built")
    for component in bundle.manifest.components:
        memory = (component.activation_bytes or 0) / 1e6
        print(f"  {component.name}: {component.engine.bytes / 1e6:.1f} MB, activation memory {memory:.1f} MB")

    for name, plan in overcrank.plan_report(bundle.path).items():
        print(f"  {name}: {plan.verdict()}")

    checks = overcrank.verify(bundle.path)
    worst = max(check.relative_error for check in checks)
    print(f"{len(checks)} comparisons with eager PyTorch; largest relative error {worst:.1e}")
    print("within 1e-4:", all(check.within(1e-4) for check in checks))
