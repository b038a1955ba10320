// A minimal test harness: failed expectations are counted and named.
#pragma once

namespace testing {

void expect(bool ok, const char* what);
bool near(double a, double b, double tolerance = 1e-12);

}  // namespace testing

void test_rewards();
void test_latents();
