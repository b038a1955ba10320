// C++ tests of the core, for runs under AddressSanitizer and UndefinedBehaviorSanitizer
// (`make asan`). Values are checked against cases worked out by hand; the Python tests compare with
// the float64 reference. Every buffer is an exact-size heap block, so that a stray index is caught.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "testing.h"

namespace {

int failures = 0;

}  // namespace

namespace testing {

void expect(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

bool near(double a, double b, double tolerance) {
  return std::fabs(a - b) <= tolerance;
}

}  // namespace testing

int main() {
  test_rewards();
  test_latents();
  if (failures != 0) return EXIT_FAILURE;
  std::puts("C++ tests passed");
  return EXIT_SUCCESS;
}
