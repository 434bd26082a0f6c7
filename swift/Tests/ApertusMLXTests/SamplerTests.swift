import ApertusCore
import Foundation
import MLX
import Testing

@testable import ApertusMLX

@Suite(.serialized) struct SamplerTests {
    private let logits = MLXArray([1, 3, 2, 0, -1] as [Float])

    private func kept(_ parameters: SamplingParameters, onGPU: Bool = false) -> [Int] {
        let values = filtered(logits, parameters, sortsOnGPU: onGPU).asArray(Float.self)
        return values.indices.filter { values[$0].isFinite }
    }

    /// Probabilities of 3, 2, 1, 0, -1 are 0.636, 0.234, 0.086, 0.032, 0.012.
    @Test(arguments: [false, true])
    func filtersKeepWhatTheySay(onGPU: Bool) throws {
        func kept(_ topP: Double, _ topK: Int = 0, _ minP: Double = 0) throws -> [Int] {
            self.kept(
                try SamplingParameters(temperature: 1, topP: topP, topK: topK, minP: minP, seed: 0),
                onGPU: onGPU)
        }
        #expect(try kept(1) == [0, 1, 2, 3, 4])
        #expect(try kept(0.6) == [1])
        #expect(try kept(0.7) == [1, 2])
        #expect(try kept(0.9) == [0, 1, 2])
        #expect(try kept(1, 3) == [0, 1, 2])
        // Among the three of top-k the likeliest has 0.665, and with the second 0.91.
        #expect(try kept(0.7, 3) == [1, 2])
        #expect(try kept(0.66, 3) == [1])
        #expect(try kept(1, 0, 0.1) == [0, 1, 2])
        #expect(try kept(1, 0, 0.5) == [1])
    }

    @Test func theLargestIsZeroAndTheRestScaled() throws {
        let parameters = try SamplingParameters(temperature: 0.5, topP: 1, seed: 0)
        #expect(filtered(logits, parameters).asArray(Float.self) == [-4, 0, -2, -6, -8])
    }

    @Test func penaltyPullsTowardsTheUnlikely() {
        let seen = MLXArray([1, 1, 0, 0, 1] as [Float])
        #expect(penalize(logits, seen, 2).asArray(Float.self) == [0.5, 1.5, 2, 0, -2])
    }

    /// Every token that came is seen from then on.
    @Test func penaltyHoldsForDrawnTokens() throws {
        let parameters = try SamplingParameters(temperature: 0, repetitionPenalty: 2, seed: 0)
        var sampler = Sampler(parameters, prompt: [2], vocabSize: 5)
        let tokens = (0 ..< 3).map { _ in Int(sampler(logits).item(Int32.self)) }
        #expect(tokens == [1, 1, 1])
        var close = Sampler(parameters, prompt: [], vocabSize: 3)
        let near = MLXArray([2.0, 1.9, 1.8] as [Float])
        #expect((0 ..< 4).map { _ in Int(close(near).item(Int32.self)) } == [0, 1, 2, 0])
    }

    @Test func aSeedRepeatsAndAnotherDiffers() throws {
        func tokens(_ seed: UInt64) throws -> [Int] {
            var sampler = Sampler(
                try SamplingParameters(temperature: 2, topP: 1, seed: seed), prompt: [],
                vocabSize: 5)
            return (0 ..< 20).map { _ in Int(sampler(logits).item(Int32.self)) }
        }
        #expect(try tokens(1) == tokens(1))
        #expect(try tokens(1) != tokens(2))
    }
}
