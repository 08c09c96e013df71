/*
 * What ThreadSanitizer has to be told of the standard library, which is not built with it.
 *
 * The fast ways of a lock are inlined into code that is. The slow ones are not, so that the sanitizer
 * does not see that who has waited for a lock comes after who had it. Each function here stands in
 * for one of the library, by the linker's --wrap: it calls that, and says what it has done. A lock's
 * state is its first word, which is the address that the fast ways use.
 *
 * MUTEX, CONDVAR_WAIT and so on are the library's symbols, which have a hash in them.
 */

#include <stdbool.h>
#include <stdint.h>

void __tsan_acquire(void *address);
void __tsan_release(void *address);

#define PASTE(a, b) a##b
#define NAME(prefix, symbol) PASTE(prefix, symbol)
#define REAL(symbol) NAME(__real_, symbol)
#define WRAP(symbol) NAME(__wrap_, symbol)

#define LOCK(symbol)                     \
    void REAL(symbol)(void *lock);       \
    void WRAP(symbol)(void *lock)        \
    {                                    \
        REAL(symbol)(lock);              \
        __tsan_acquire(lock);            \
    }

LOCK(MUTEX)
LOCK(RWLOCK_READ)
LOCK(RWLOCK_WRITE)

void REAL(CONDVAR_WAIT)(void *condvar, void *mutex);
void WRAP(CONDVAR_WAIT)(void *condvar, void *mutex)
{
    __tsan_release(mutex);
    REAL(CONDVAR_WAIT)(condvar, mutex);
    __tsan_acquire(mutex);
}

bool REAL(CONDVAR_WAIT_TIMEOUT)(void *condvar, void *mutex, uint64_t seconds, uint32_t nanoseconds);
bool WRAP(CONDVAR_WAIT_TIMEOUT)(void *condvar, void *mutex, uint64_t seconds, uint32_t nanoseconds)
{
    __tsan_release(mutex);
    bool woken = REAL(CONDVAR_WAIT_TIMEOUT)(condvar, mutex, seconds, nanoseconds);
    __tsan_acquire(mutex);
    return woken;
}

/* Who finds it done without waiting may do so before the release here: see threads.supp. */
void REAL(ONCE)(void *once, bool ignore_poisoning, void *f, void *vtable, void *location);
void WRAP(ONCE)(void *once, bool ignore_poisoning, void *f, void *vtable, void *location)
{
    REAL(ONCE)(once, ignore_poisoning, f, vtable, location);
    __tsan_acquire(once);
    __tsan_release(once);
}
