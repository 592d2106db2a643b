"""Inverses that people really use: g from a published package, derivatives checked to full precision.

One file a case: g, f in torch, f once more in mpmath, and points that reach into the hard corners.
`python -m tests.real_cases` prints what is measured.
"""

PACKAGES = {
    "ndtri": "scipy",
    "lambertw": "scipy",
    "sqrtm": "scipy",
    "implied_volatility": "py_lets_be_rational",
    "kepler": "exoplanet_core",
    "undistort_points": "cv2",
    "inverse_kinematics": "scipy",
    "potential_temperature": "gsw",
}
"""The modules of this folder that define `CASES`, and the package that each takes its g from."""
