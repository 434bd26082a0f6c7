import ApertusCore
import Foundation
import MLX
import Testing

@testable import ApertusMLX

@Suite(.serialized) struct CacheTests {
    private static let fixtures = ModelFixture.withForms

    private func form(_ options: JSON) throws -> CacheForm {
        try CacheForm(
            keyBits: options["key_bits"]?.int ?? 16, valueBits: options["value_bits"]?.int ?? 16,
            bound: options["bound"]?.int, sinks: options["sinks"]?.int ?? 4,
            window: options["window"]?.int ?? 64, rotates: options["rotate"]?.flag)
    }

    @Test(arguments: fixtures)
    func formsHaveTheBitsOfPython(fixture: ModelFixture) throws {
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        let cases = try fixture.cases("forms")
        #expect(cases.count > 7)
        for (name, options) in cases {
            let form = try form(options)
            let rows = try #require(expected["float32.form.\(name).logits"])
            let cache = try model.makeCache(form)
            var logits = try prefill(model, ids, cache: cache, step: 64) { _ in }
            for row in 0 ..< rows.dim(0) {
                #expect(bits(logits) == bits(rows[row]), "\(name), position \(row)")
                let token = argMax(logits, axis: -1).reshaped([1, 1])
                logits = model.nextTokenLogits(token, cache: cache)
            }
            let tokens = ints(try #require(expected["float32.form.\(name).greedy"]))
            let run = try CachedPrefix(model: model, form: form).begin(
                ids, maxTokens: tokens.count, prefillStep: 64)
            #expect(try drain(run) == tokens, "\(name)")
        }
    }

    /// A query sees what stands after its own position, so chunks change nothing but rounding.
    @Test(arguments: [1, 7, 128])
    func chunksChangeNoToken(step: Int) throws {
        let fixture = Self.fixtures[0]
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        for (name, options) in try fixture.cases("forms") {
            let tokens = ints(try #require(expected["float32.form.\(name).greedy"]))
            let run = try CachedPrefix(model: model, form: form(options)).begin(
                ids, maxTokens: 20, prefillStep: step)
            #expect(try drain(run) == Array(tokens[..<20]), "\(name)")
        }
    }

    /// What was taken back has never been: the next tokens are the same.
    @Test func rewindsExactly() throws {
        let fixture = Self.fixtures[0]
        let ids = fixture.ids(try fixture.expected())
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        for (name, options) in try fixture.cases("forms") {
            let form = try form(options)
            let fresh = try model.makeCache(form)
            _ = try prefill(model, Array(ids[..<120]), cache: fresh, step: 64) { _ in }
            let after = model.nextTokenLogits(MLXArray([9], [1, 1]), cache: fresh)
            let cache = try model.makeCache(form)
            _ = try prefill(model, Array(ids[..<140]), cache: cache, step: 64) { _ in }
            // Rings that have turned have lost what would come back.
            let canTrim = form.bound == nil
            for layer in cache { #expect(layer.trim(20) == canTrim, "\(name)") }
            guard canTrim else { continue }
            #expect(cache[0].offset == 120)
            let again = model.nextTokenLogits(MLXArray([9], [1, 1]), cache: cache)
            let (a, b) = (after.asArray(Float.self), again.asArray(Float.self))
            #expect(zip(a, b).allSatisfy { abs($0 - $1) < 1e-4 }, "\(name)")
        }
    }

    @Test func restoresWhatItExported() throws {
        let fixture = Self.fixtures[0]
        let ids = fixture.ids(try fixture.expected())
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        for (name, options) in try fixture.cases("forms") {
            let form = try form(options)
            let prefix = try CachedPrefix(model: model, form: form)
            let tokens = try drain(try prefix.begin(ids, maxTokens: 10, prefillStep: 64))
            let held = try prefix.tokens
            let other = try CachedPrefix(model: model, form: form)
            try other.restore(tokens: held, layers: try prefix.export())
            #expect(try other.tokens == held)
            let longer = held + [tokens.last!, 7]
            let run = try other.begin(longer, maxTokens: 10)
            #expect(run.reused == held.count, "\(name)")
            #expect(
                try drain(run) == drain(try prefix.begin(longer, maxTokens: 10)), "\(name)")
        }
    }

    @Test func foreignArraysAreRefused() throws {
        let fixture = Self.fixtures[0]
        let ids = fixture.ids(try fixture.expected())
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        let zero = MLXArray.zeros([1, 1, 1, 1])
        for (name, options) in try fixture.cases("forms") {
            let form = try form(options)
            let prefix = try CachedPrefix(model: model, form: form)
            _ = try drain(try prefix.begin(ids, maxTokens: 1))
            let (tokens, layers) = (try prefix.tokens, try prefix.export())
            func expectRefusal(_ tokens: [Int], _ layers: [[String: MLXArray]]) {
                let error = #expect(throws: ApertusError.self, "\(name)") {
                    try prefix.restore(tokens: tokens, layers: layers)
                }
                #expect(error?.kind == .rejected)
                #expect((try? prefix.tokens) == [])
            }
            expectRefusal(tokens, [layers[0]])
            expectRefusal(tokens.dropLast() + [384], layers)
            for array in layers[1].keys {
                var changed = layers
                changed[1][array] = zero
                expectRefusal(tokens, changed)
                changed[1][array] = array == "departed" ? zero : nil
                expectRefusal(tokens, changed)
                changed[1] = layers[1]
                changed[1]["more"] = zero
                expectRefusal(tokens, changed)
            }
            try prefix.restore(tokens: tokens, layers: layers)
            #expect(try prefix.tokens == tokens)
        }
    }

    @Test func aRingKeepsSinksAndTheLatest() {
        let ring = Ring(size: 6, kept: 2)
        func row(_ numbers: [Int]) -> [MLXArray] {
            [MLXArray(numbers.map(Float.init), [1, 1, numbers.count, 1])]
        }
        func values(_ rows: [MLXArray]) -> [Int] { rows[0].asArray(Float.self).map { Int($0) } }
        #expect(values(ring.append(row([0, 1, 2]))) == [0, 1, 2])
        #expect(values(ring.append(row([3, 4, 5]))) == [0, 1, 2, 3, 4, 5])
        #expect(values(ring.append(row([6]))) == [0, 1, 6, 3, 4, 5])
        let together = ring.append(row([7, 8, 9]), keepEvicted: true)
        #expect(values(together) == [0, 1, 6, 3, 4, 5, 7, 8, 9])
        #expect(values(ring.rows()) == [0, 1, 6, 7, 8, 9])
        #expect(ring.numbers(1) == [0, 1, 6, 7, 8, 9, 10])
    }

    @Test func roomGrowsByAnEighth() {
        #expect([1, 256, 257, 4096, 4097, 40_000].map(Store.capacity(for:))
            == [256, 256, 512, 4096, 4608, 40_960])
    }

    /// Codes unpacked by hand, against the vectors that they stand for.
    @Test(arguments: [2, 3, 4, 6, 8])
    func codesAreNearWhatTheyStandFor(bits: Int) {
        let values = (0 ..< 64).map { sin(Float($0) * 1.7) * Float($0 % 5 + 1) }
        let codes = CacheCodes(
            quantizing: MLXArray(values, [1, 1, 1, 64]), bits: bits, groupSize: 32)
        let words = codes.words.asArray(UInt32.self)
        let scales = codes.scales.asType(.float32).asArray(Float.self)
        let biases = codes.biases.asType(.float32).asArray(Float.self)
        for (index, value) in values.enumerated() {
            let bit = index * bits
            var code = UInt64(words[bit / 32]) >> UInt64(bit % 32)
            if bit / 32 + 1 < words.count {
                code |= UInt64(words[bit / 32 + 1]) << UInt64(32 - bit % 32)
            }
            let number = Float(code & (1 << UInt64(bits) - 1))
            let found = number * scales[index / 32] + biases[index / 32]
            // Half a step, and what the search may leave out at an end of the range.
            let range = scales[index / 32] * Float((1 << bits) - 1)
            #expect(abs(found - value) <= scales[index / 32] * 0.55 + range * 0.11)
        }
    }
}
