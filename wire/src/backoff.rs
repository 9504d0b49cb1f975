//! When to try again: pauses that double from `min` to `max`, each drawn from its upper half, so that many
//! sources that lost one receiver do not come back at one instant.

use std::time::Duration;

/// Pauses between attempts. Holds no clock: the caller sleeps.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// Pauses from `min` to `max`.
    pub fn new(min: Duration, max: Duration) -> Backoff {
        Backoff { min, max: max.max(min), next: min }
    }

    /// How long to pause before the next attempt.
    pub fn pause(&mut self) -> Duration {
        // 53 random bits are a fraction of 1.
        let drawn = (machine::random_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        self.pause_drawn(0.5 + drawn / 2.0)
    }

    /// An attempt worked: the next failure starts at `min` again.
    pub fn reset(&mut self) {
        self.next = self.min;
    }

    fn pause_drawn(&mut self, share: f64) -> Duration {
        let pause = self.next.mul_f64(share);
        self.next = (self.next * 2).min(self.max);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_the_limit_and_start_over() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(200), ms(1000));
        let pauses: Vec<_> = (0..5).map(|_| backoff.pause_drawn(1.0)).collect();
        assert_eq!(pauses, [ms(200), ms(400), ms(800), ms(1000), ms(1000)]);
        backoff.reset();
        assert_eq!(backoff.pause_drawn(0.5), ms(100));
        for _ in 0..1000 {
            backoff.reset();
            assert!((ms(100)..=ms(200)).contains(&backoff.pause()));
        }
    }
}
