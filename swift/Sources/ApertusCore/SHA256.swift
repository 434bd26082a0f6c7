import Foundation

#if canImport(CryptoKit)
    import CryptoKit

    /// The SHA-256 of bytes that arrive in parts (FIPS 180-4), by the system's own code.
    package struct Digest256 {
        private var hash = SHA256()
        package init() {}
        package mutating func update(_ data: Data) { hash.update(data: data) }
        package func finish() -> [UInt8] { Array(hash.finalize()) }
    }
#else
    /// The SHA-256 of bytes that arrive in parts (FIPS 180-4), where the system has no CryptoKit.
    package struct Digest256 {
        private static let constants: [UInt32] = roots(of: primes(64), power: 3)
        private var state = roots(of: primes(8), power: 2)
        private var rest: [UInt8] = []
        private var count: UInt64 = 0

        package init() {}

        package mutating func update(_ data: Data) {
            count += UInt64(data.count)
            rest.append(contentsOf: data)
            let whole = rest.count / 64 * 64
            for start in stride(from: 0, to: whole, by: 64) { mix(rest[start ..< start + 64]) }
            rest.removeFirst(whole)
        }

        package func finish() -> [UInt8] {
            var last = self
            let bits = count * 8
            let zeros = (119 - Int(count % 64)) % 64
            last.update(Data([0x80] + [UInt8](repeating: 0, count: zeros)))
            last.update(Data((0 ..< 8).reversed().map { UInt8(truncatingIfNeeded: bits >> ($0 * 8)) }))
            return last.state.flatMap { word in
                (0 ..< 4).reversed().map { UInt8(truncatingIfNeeded: word >> ($0 * 8)) }
            }
        }

        private mutating func mix(_ block: ArraySlice<UInt8>) {
            func turned(_ word: UInt32, _ by: UInt32) -> UInt32 { word >> by | word << (32 - by) }
            var w = [UInt32](repeating: 0, count: 64)
            for (index, byte) in block.enumerated() { w[index / 4] = w[index / 4] << 8 | UInt32(byte) }
            for i in 16 ..< 64 {
                let s0 = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3
                let s1 = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10
                w[i] = w[i - 16] &+ s0 &+ w[i - 7] &+ s1
            }
            var (a, b, c, d) = (state[0], state[1], state[2], state[3])
            var (e, f, g, h) = (state[4], state[5], state[6], state[7])
            for i in 0 ..< 64 {
                let s1 = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)
                let t1 = h &+ s1 &+ (e & f ^ ~e & g) &+ Self.constants[i] &+ w[i]
                let s0 = turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)
                let t2 = s0 &+ (a & b ^ a & c ^ b & c)
                (h, g, f, e, d, c, b, a) = (g, f, e, d &+ t1, c, b, a, t1 &+ t2)
            }
            for (i, word) in [a, b, c, d, e, f, g, h].enumerated() { state[i] &+= word }
        }

        /// The first 32 bits of the fractions of square (2) or cube (3) roots.
        private static func roots(of numbers: [Double], power: Double) -> [UInt32] {
            numbers.map { number in
                let root = pow(number, 1 / power)
                return UInt32((root - root.rounded(.down)) * 4_294_967_296)
            }
        }

        private static func primes(_ count: Int) -> [Double] {
            var found: [Int] = []
            var candidate = 2
            while found.count < count {
                if found.allSatisfy({ candidate % $0 != 0 }) { found.append(candidate) }
                candidate += 1
            }
            return found.map(Double.init)
        }
    }
#endif
