// Threads: started per call, so that a fork finds no pool; the split does not change a bit.

#pragma once

#include "elements.h"

#include <pthread.h>

struct Share { void (*run)(void*, i64, i64, int); void* what; i64 from, to; int who; };
static void* work(void* at) { Share* s = (Share*)at; s->run(s->what, s->from, s->to, s->who); return 0; }

static const int MOST_THREADS = 256;
static void parallel(i64 units, i64 size, int threads, void (*run)(void*, i64, i64, int), void* what) {
  i64 wanted = least<i64>(least<i64>(threads, MOST_THREADS), least<i64>(units, size / 65536));
  int count = (int)most<i64>(1, wanted);
  Share shares[MOST_THREADS];
  pthread_t handle[MOST_THREADS];
  bool started[MOST_THREADS];
  for (int i = 0; i < count; i++) {
    Share share = {run, what, units * i / count, units * (i + 1) / count, i};
    shares[i] = share;
    started[i] = i > 0 && pthread_create(&handle[i], 0, work, &shares[i]) == 0;
  }
  for (int i = 0; i < count; i++)
    if (!started[i]) work(&shares[i]);
  for (int i = 1; i < count; i++)
    if (started[i]) pthread_join(handle[i], 0);
}
