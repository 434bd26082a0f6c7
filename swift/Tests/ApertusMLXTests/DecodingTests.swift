import ApertusCore
import Foundation
import MLX
import Testing

@testable import ApertusMLX

@Suite(.serialized) struct DecodingTests {
    @Test(arguments: ModelFixture.all)
    func greedyTokensAreThoseOfPython(fixture: ModelFixture) throws {
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let tokens = ints(try #require(expected["float32.greedy"]))
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        let run = try CachedPrefix(model: model).begin(
            ids, maxTokens: tokens.count, prefillStep: 64)
        #expect(try drain(run) == tokens)
    }

    @Test(arguments: [1, 7, 128])
    func chunksChangeNoToken(step: Int) throws {
        let fixture = ModelFixture(name: "affine-4-64")
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let tokens = ints(try #require(expected["float32.greedy"]))
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        var told: [Int] = []
        let run = try CachedPrefix(model: model).begin(
            ids, maxTokens: tokens.count, prefillStep: step, onPrefill: { told.append($0) })
        #expect(try drain(run) == tokens)
        #expect(told.count == chunkSizes(ids.count, step: step).count && told.last == ids.count)
    }

    /// Worked by hand from Python's `chunk_sizes`.
    @Test func chunkSizesAreThoseOfPython() {
        #expect(chunkSizes(5, step: 512) == [5])
        #expect(chunkSizes(512, step: 512) == [512])
        #expect(chunkSizes(513, step: 512) == [449, 64])
        #expect(chunkSizes(1024 + 63, step: 512) == [512, 511, 64])
        #expect(chunkSizes(576, step: 512) == [512, 64])
        #expect(chunkSizes(130, step: 128) == [66, 64])
        #expect(chunkSizes(130, step: 127) == [127, 3])
        #expect(chunkSizes(15, step: 7) == [7, 7, 1])
    }

    @Test(arguments: ["float32-sharded", "affine-4-64"])
    func seedsGiveTheTokensOfPython(name: String) throws {
        let fixture = ModelFixture(name: name)
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        let cases = try fixture.cases("sampled")
        #expect(cases.count > 4)
        for (name, options) in cases {
            let tokens = ints(try #require(expected["float32.sampled.\(name)"]))
            let run = try CachedPrefix(model: model).begin(
                ids, sampling: try parameters(options), maxTokens: tokens.count, prefillStep: 64)
            #expect(try drain(run) == tokens, "\(name)")
        }
    }

    private func parameters(_ options: JSON) throws -> SamplingParameters {
        try SamplingParameters(
            temperature: options["temperature"]?.double ?? 0.8,
            topP: options["top_p"]?.double ?? 0.9, topK: options["top_k"]?.int ?? 0,
            minP: options["min_p"]?.double ?? 0,
            repetitionPenalty: options["repetition_penalty"]?.double ?? 1,
            presencePenalty: options["presence_penalty"]?.double ?? 0,
            frequencyPenalty: options["frequency_penalty"]?.double ?? 0, seed: 7)
    }

    @Test func resumesWithNewTokensAlone() throws {
        let fixture = ModelFixture(name: "affine-4-64")
        let ids = fixture.ids(try fixture.expected())
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        let prefix = try CachedPrefix(model: model)
        let first = try drain(try prefix.begin(Array(ids[..<100]), maxTokens: 5))
        let longer = ids[..<100] + first[..<3] + ids[100...]
        let run = try prefix.begin(Array(longer), maxTokens: 8)
        #expect(run.reused == 103)
        let fresh = try CachedPrefix(model: model).begin(Array(longer), maxTokens: 8)
        #expect(try drain(run) == drain(fresh))
        // The same prompt again: its last token is left to compute.
        #expect(try prefix.begin(Array(longer), maxTokens: 1).reused == longer.count - 1)
    }

    @Test func aCancelledRunLeavesAUsablePrefix() throws {
        let fixture = ModelFixture(name: "affine-4-64")
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let tokens = ints(try #require(expected["float32.greedy"]))
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        for form in [CacheForm.full, try CacheForm(bound: 200), try CacheForm(keyBits: 8)] {
            let whole = try CachedPrefix(model: model, form: form)
            let clean = try drain(try whole.begin(ids, maxTokens: 6, prefillStep: 32))
            if form == .full { #expect(clean == Array(tokens[..<6])) }
            let prefix = try CachedPrefix(model: model, form: form)
            // It is asked before and between 5 chunks of the prompt, then before each token.
            for allowed in 0 ..< 10 {
                try prefix.forget()
                var asked = 0
                let run = try prefix.begin(
                    ids, maxTokens: 6, prefillStep: 32,
                    isCancelled: {
                        asked += 1
                        return asked > allowed
                    })
                let error = #expect(throws: ApertusError.self) { _ = try drain(run) }
                #expect(error?.kind == .cancelled)
                let held = try prefix.tokens
                #expect(held.isEmpty == (allowed == 0))
                #expect(Array((ids + clean).prefix(held.count)) == held)
                let again = try prefix.begin(ids, maxTokens: 6, prefillStep: 32)
                #expect(try drain(again) == clean, "\(form), \(allowed)")
            }
        }
    }

    @Test func anOlderRunGoesNoFurther() throws {
        let model = try ApertusModel(folder: ModelFixture(name: "bf16").folder)
        let prefix = try CachedPrefix(model: model)
        let older = try prefix.begin([5, 6, 7], maxTokens: 4)
        _ = try older.nextToken()
        _ = try drain(try prefix.begin([5, 6, 8], maxTokens: 2))
        let error = #expect(throws: ApertusError.self) { _ = try older.nextToken() }
        #expect(error?.kind == .bug)
    }

    @Test func refusesWhatCannotBe() throws {
        let model = try ApertusModel(folder: ModelFixture(name: "bf16").folder)
        let prefix = try CachedPrefix(model: model)
        for prompt in [[], [384], [-1]] {
            let error = #expect(throws: ApertusError.self) {
                _ = try prefix.begin(prompt, maxTokens: 4)
            }
            #expect(error?.kind == .usage)
        }
        #expect(throws: ApertusError.self) { try SamplingParameters(temperature: .nan) }
        #expect(throws: ApertusError.self) { try SamplingParameters(topP: 0) }
        #expect(throws: ApertusError.self) { try SamplingParameters(topK: -1) }
        #expect(throws: ApertusError.self) { try SamplingParameters(minP: 1.5) }
        #expect(throws: ApertusError.self) { try SamplingParameters(repetitionPenalty: 0) }
    }

    @Test func deadLogitsAreRefused() throws {
        let copy = try FolderCopy(ModelFixture(name: "bf16"))
        try copy.changeTensors { arrays in
            let name = "lm_head.weight"
            arrays[name] = MLXArray.zeros(arrays[name]!.shape, dtype: .bfloat16)
        }
        let prefix = try CachedPrefix(model: try ApertusModel(folder: copy.url))
        let run = try prefix.begin([5, 6], maxTokens: 4)
        let error = #expect(throws: ApertusError.self) { _ = try run.nextToken() }
        #expect(error?.description.contains("all equal") == true)
        #expect(try prefix.tokens.isEmpty)
    }
}
