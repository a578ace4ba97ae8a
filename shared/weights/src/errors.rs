//! How far the written values are from the given ones.

/// Sums over the values of a tensor; added up in the order of its pieces, so equal on any number of threads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// Values.
    pub count: u64,
    /// Sum of squared differences.
    difference: f64,
    /// Largest difference.
    largest: f64,
    /// Sums of squares of the given values and of the written ones, and of their products.
    given: f64,
    written: f64,
    product: f64,
}

impl Errors {
    /// Adds values and what readers will see of them.
    pub fn add(&mut self, given: &[f32], written: &[f32]) {
        self.count += given.len() as u64;
        for (&g, &w) in given.iter().zip(written) {
            let (g, w) = (f64::from(g), f64::from(w));
            let off = w - g;
            self.difference += off * off;
            self.largest = if off.abs() > self.largest { off.abs() } else { self.largest };
            self.given += g * g;
            self.written += w * w;
            self.product += g * w;
        }
    }

    /// Adds the sums of what follows.
    pub fn append(&mut self, other: &Self) {
        self.count += other.count;
        self.difference += other.difference;
        self.largest = self.largest.max(other.largest);
        self.given += other.given;
        self.written += other.written;
        self.product += other.product;
    }

    /// Returns the root of the mean squared difference.
    pub fn rms(&self) -> f64 {
        (self.difference / self.count.max(1) as f64).sqrt()
    }

    /// Returns [`Errors::rms`] over the root mean square of the given values; 0 when all of them are 0.
    pub fn relative(&self) -> f64 {
        if self.given > 0.0 { (self.difference / self.given).sqrt() } else { 0.0 }
    }

    /// Returns the largest difference.
    pub fn largest(&self) -> f64 {
        self.largest
    }

    /// Returns the cosine of the angle between given and written values; 1 when both are zeros.
    pub fn cosine(&self) -> f64 {
        let lengths = (self.given * self.written).sqrt();
        if lengths > 0.0 { self.product / lengths } else { f64::from(u8::from(self.given == self.written)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_definition() {
        let mut errors = Errors::default();
        errors.add(&[3.0, 0.0], &[3.0, 1.0]);
        let mut rest = Errors::default();
        rest.add(&[0.0, 4.0], &[0.0, 2.0]);
        errors.append(&rest);
        assert_eq!((errors.rms(), errors.relative(), errors.largest()), (1.25f64.sqrt(), 0.2f64.sqrt(), 2.0));
        assert!((errors.cosine() - 17.0 / (25.0f64 * 14.0).sqrt()).abs() < 1e-15);
        assert_eq!(Errors::default().cosine(), 1.0);
    }
}
